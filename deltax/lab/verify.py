"""Run a paper's claims, and keep what they came to in `evidence/KEY.json`."""

import fcntl
import importlib
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltax import catalog
from deltax.claim import Claim, Verdict
from deltax.errors import UserError, nearest
from deltax.lab import warm
from deltax.lab.lab import Lab
from deltax.lab.store import Store
from deltax.train.machine import Machine
from deltax.whole import whole

IDLE = 0.5  # processes wanting to run, other than us, below which a machine counts as idle


def verify(key: str, *, lab: Lab | None = None, only: str | None = None) -> dict[str, Any]:
    """Check a paper's claims, or the one named `only`, and store what they came to as evidence.

    Returns the evidence as stored: {"key", "exact", "parity", "measured", "speed"}, each claim by name. A claim that
    fails or cannot be measured is stored as such. Measured claims wait until no other verification on this store
    trains or times. Raises UserError for an unknown paper or claim, and where evidence cannot be written.
    """
    record = catalog.find(key)
    module = importlib.import_module(record.claims_module)
    known = [c.name for c in record.claims]
    if only is not None and only.replace("-", "_") not in known:
        raise UserError(f"{record.key} has no claim {only!r}{nearest(only, known) or ': ' + ', '.join(known)}")
    lab = lab or Lab()
    folder = catalog.evidence_folder()
    stored = _read(folder, record.key)
    for name in known if only is None else [only.replace("-", "_")]:
        claim = getattr(module, name)
        if claim.kind == "measured":
            with exclusive(lab.store):
                entry, figures = _measured(claim, record.key, lab.anew())
        else:
            entry, figures = _checked(claim), {}
        stored = _keep(folder, record.key, (claim.kind, name), entry, figures, known)
    return stored


@contextmanager
def exclusive(store: Store) -> Iterator[None]:
    """Alone with the machine, among all that ask for it on this store."""
    warm.guard()  # it would wait for its own parent
    store.check_writable()
    with open(store.folder / "machine.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checked(claim: Claim) -> dict[str, Any]:
    started = time.monotonic()
    entry: dict[str, Any] = {"says": claim.says, **({"peer": claim.peer} if claim.peer else {})}
    try:
        claim()
        entry["passed"] = True
    except ImportError as error:
        entry |= {"passed": None, "why": f"{error.name or error} is not installed: pip install 'deltax-ml[test]'"}
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        entry |= {"passed": False, "why": f"{type(error).__name__}: {text[0]}".rstrip(": ")}
    return {**entry, **_when(started)}


def _measured(claim: Claim, key: str, lab: Lab) -> tuple[dict[str, Any], dict[str, str]]:
    load, started = os.getloadavg()[0], time.monotonic()
    verdict = claim(lab)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"{claim.name} of {key} returned {type(verdict).__name__}; a measured claim returns a Verdict")
    found = verdict.to_json()
    figures = found.pop("figures")
    entry = {
        "says": claim.says,
        "paper": claim.paper,
        "summary": str(verdict),
        **found,
        "command": f"dx verify {key}",
        **_when(started),
        "load": round(load, 2),
        "idle": load < IDLE,
    }
    return entry, figures


def _when(started: float) -> dict[str, Any]:
    return {
        "seconds": round(time.monotonic() - started, 1),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {**Machine.here().describe(), "cores": os.cpu_count()},
    }


def _keep(
    folder: Path, key: str, claim: tuple[str, str], entry: dict[str, Any], figures: dict[str, str], known: list[str]
) -> dict[str, Any]:
    """The paper's evidence, on disk at once, with the entry of one claim, a kind and a name, changed.

    Entries of claims that are no longer `known` are left out.
    """
    kind, name = claim
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{key}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if kind == "measured":
                entry["figures"] = {}
                for n, (caption, svg) in enumerate(figures.items(), 1):
                    file = f"figures/{key}-{name.replace('_', '-')}-{n}.svg"
                    _write(folder / file, svg)
                    entry["figures"][caption] = file
            stored = _read(folder, key)
            for each in ("exact", "parity", "measured"):
                stored[each] = {word: e for word, e in stored[each].items() if word in known and word != name}
            stored[kind][name] = _plain(entry)
            _write(folder / f"{key}.json", json.dumps(stored, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            return stored
    except OSError as error:
        raise UserError(
            f"cannot write evidence ({error.strerror}): run this where a folder 'evidence' can be"
        ) from None


def _read(folder: Path, key: str) -> dict[str, Any]:
    path = folder / f"{key}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is not JSON: mend it, or delete it to verify anew") from None
    return {"key": key, **{kind: stored.get(kind, {}) for kind in ("exact", "parity", "measured", "speed")}}


def _write(path: Path, text: str) -> None:
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON can hold it: numbers of numpy and torch as Python's, those not finite as words."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _commit() -> str | None:
    """The commit of the checkout, with + when something tracked was changed since; None outside one."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "deltax"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
