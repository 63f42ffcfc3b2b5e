"""Comparisons that are finished, and runs that are going on, out of the store of runs."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from deltax.errors import UserError
from deltax.lab.store import Line, Store

RECENT = 3600.0
"""Seconds for which a finished run that is of no comparison is counted beside those that are going on."""


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
        """What goes on now: {"plans": [{"plan", "title", "scale", "runs", "done", "arms"}], "arms", "comparisons"}.

        An arm: {"title", "done", "runs": [...]}; those beside the plans are of no comparison. A run: id, seed, step,
        steps, loss (nats), speed (tokens/s), state.
        """
        if self.store is None:
            return {"plans": [], "arms": [], "comparisons": []}
        lines = self.store.runs(limit=500)
        plans: dict[str, dict[str, Any]] = {}
        for since, said in self.store.going_on("comparing"):
            arms = [_arm(a["name"], lines, since, title=a["title"], steps=set(a["steps"])) for a in said["arms"]]
            title = " · ".join(a["name"] for a in said["arms"])
            known = {"plan": said["plan"], "title": title, "scale": said["scale"], "runs": said["runs"]}
            plans.setdefault(said["plan"], {**known, "done": sum(a["done"] for a in arms), "arms": arms})
        planned = {run["id"] for plan in plans.values() for arm in plan["arms"] for run in arm["runs"]}
        alone = [line for line in lines if line.id not in planned]
        titles = sorted({line.title for line in alone if line.state == "running"})
        others = [_arm(title, alone, time.time() - RECENT, title=title) for title in titles]
        return {"plans": list(plans.values()), "arms": others, "comparisons": list(self.comparisons())}


class PublishedRuns(Runs):
    """Comparisons as others may see them: a text of the reader's own has its name, and not the folder it lies in."""

    def comparisons(self) -> dict[str, dict[str, Any]]:
        return {name: _nowhere(record) for name, record in super().comparisons().items()}


def _nowhere(record: dict[str, Any]) -> dict[str, Any]:
    for row in record["rows"]:
        source = ((row.get("recipe") or {}).get("given", {}).get("task", {}).get("given", {})).get("source") or ""
        if not source.startswith("hf:") and (name := Path(source).name) != source:
            record = json.loads(json.dumps(record).replace(json.dumps(source)[1:-1], json.dumps(name)[1:-1]))
    return record


def short(key: str) -> str:
    """The name of a comparison in addresses."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _arm(name: str, lines: list[Line], since: float, *, title: str, steps: set[int] | None = None) -> dict[str, Any]:
    """The runs of a recipe, of these lengths where given, that go on, and how many ended since then."""
    own = [line for line in lines if line.title == title and (steps is None or line.steps in steps)]
    runs = sorted((_run(line) for line in own if line.state == "running"), key=lambda run: (run["seed"], run["id"]))
    done = sum(line.finished is not None and line.finished.timestamp() >= since for line in own)
    return {"title": name, "done": done, "runs": runs}


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
