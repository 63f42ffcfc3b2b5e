"""Comparisons that are finished, and runs that are going on, out of the store of runs."""

import hashlib
import time
from pathlib import Path
from typing import Any

from deltax.errors import UserError
from deltax.lab.store import Line, Store

RECENT = 3600.0
"""Seconds for which a finished run is shown beside those that are going on."""


class Runs:
    """The store in `folder`; nothing where there is none. May be used from any thread."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._store: Store | None = None

    @property
    def store(self) -> Store | None:
        if self._store is None and (self.folder / "runs.sqlite").exists():
            self._store = Store(self.folder)
        return self._store

    def comparisons(self) -> dict[str, dict[str, Any]]:
        """Finished comparisons by a short id, the latest first, as `Comparison.to_json` gave them."""
        records = self.store.records("comparison") if self.store else {}
        return {short(key): value for key, value in reversed(records.items())}

    def comparison(self, name: str) -> dict[str, Any]:
        found = self.comparisons().get(name)
        if found is None:
            raise UserError(f"there is no comparison {name!r} in the store")
        return found

    def live(self) -> dict[str, Any]:
        """What is training now, by recipe: {"arms": [{"title", "done", "runs": [...]}], "comparisons": [ids]}.

        A run: id, seed, step, steps, loss (nats), speed (tokens/s), state.
        """
        if self.store is None:
            return {"arms": [], "comparisons": []}
        lines = self.store.runs(limit=200)
        arms: dict[str, dict[str, Any]] = {}
        for line in lines:
            if line.state == "running":
                arms.setdefault(line.title, {"title": line.title, "done": 0, "runs": []})["runs"].append(_run(line))
        for line in lines:
            if line.title in arms and line.finished and time.time() - line.finished.timestamp() < RECENT:
                arms[line.title]["done"] += 1
        for arm in arms.values():
            arm["runs"].sort(key=lambda run: (run["seed"], run["id"]))
        return {"arms": sorted(arms.values(), key=lambda a: a["title"]), "comparisons": list(self.comparisons())}


def short(key: str) -> str:
    """The name of a comparison in addresses."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _run(line: Line) -> dict[str, Any]:
    return {
        "id": line.id,
        "seed": line.seed,
        "step": line.step,
        "steps": line.steps,
        "loss": line.loss,
        "speed": line.speed,
        "state": line.state,
    }
