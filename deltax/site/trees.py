"""What needs the trees of recipes: a paper's diff to its X, and which deltas compose.

Recipes import torch, which takes seconds and has no place in a request. So another process works them out
(`python -m deltax.site.trees`: a request as JSON on its standard input, the answer on its output) and the answers are
cached by the source they came from.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from deltax import catalog
from deltax.catalog import Record
from deltax.errors import UserError
from deltax.site.layout import ancestors
from deltax.whole import whole

BASE = "gpt"
"""The recipe on which deltas are composed with one another."""

_PATIENCE = 600.0
_PAIRED = ("pairs", "orders", "reasons")


class Trees:
    """Answers from the cache in `folder`; what is missing is asked of another process, for all keys at once.

    An answer counts as long as the papers that it is about, those they build on, and the house below them are the
    same: a new paper costs its own diff, and its own row of the table.
    """

    def __init__(self, folder: Path, papers: Mapping[str, Record] | None = None):
        self.folder = folder
        self.papers = catalog.papers() if papers is None else papers

    def cached(self, key: str) -> dict[str, Any] | None:
        """A paper's diff if it is known: {"a", "b", "diff": [{"path", "a", "b"}], "command"} or {"missing": why}."""
        if chain(key, self.papers) is None:
            return {"missing": "it is no change to a recipe"}
        found = _load(self._file(key))
        return found["found"] if found and found.get("state") == self._states[key] else None

    def diffs(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Every key's diff. Takes some seconds when one is not cached."""
        found = {key: self.cached(key) for key in keys}
        wanted = {key: chain(key, self.papers) for key, diff in found.items() if diff is None}
        if wanted:
            found |= self._keep(self._ask({"diffs": wanted}))["diffs"]
        return {key: diff for key, diff in found.items() if diff is not None}

    def prepare(self) -> None:
        """Work out whatever is missing, in one go."""
        wanted = {key: chain(key, self.papers) for key in self.papers if self.cached(key) is None}
        request: dict[str, Any] = {"diffs": wanted} if wanted else {}
        if self.cached_compositions() is None:
            request["compose"] = self._unknown()
        if request:
            self._keep(self._ask(request))

    def cached_compositions(self) -> dict[str, Any] | None:
        found = _load(self.folder / "compose.json")
        return found["found"] if found and found.get("states") == self._deltas() else None

    def compositions(self) -> dict[str, Any]:
        """Which deltas on BASE compose: {"base", "keys", "pairs": {"a b": outcome}, "orders": {"a b": order},
        "reasons": {"a b": sentence}}.

        Outcomes: "commutes" (both orders give one tree), "composes" (the order counts, or one order alone works),
        "replaces" (one stands in place of the other), "excludes" (neither order works). Where one order alone works,
        it is "forward" (a, then b) or "backward".
        """
        found = self.cached_compositions()
        if found is None:
            found = self._keep(self._ask({"compose": self._unknown()}))["compose"]
        return found

    def _deltas(self) -> dict[str, str]:
        """Every delta and its state."""
        return {key: self._states[key] for key, r in self.papers.items() if r.kind == "delta"}

    def _unknown(self) -> dict[str, Any]:
        """A request for the table of pairs, with those that still stand."""
        before = _load(self.folder / "compose.json") or {"states": {}, "found": {}}
        now, table = self._deltas(), before["found"]
        stands = lambda pair: all(now.get(key) == before["states"].get(key, "") for key in pair.split())
        known = {kind: {p: v for p, v in table.get(kind, {}).items() if stands(p)} for kind in _PAIRED}
        return {"keys": list(now), "known": known}

    def _keep(self, answer: dict[str, Any]) -> dict[str, Any]:
        for key, diff in answer.get("diffs", {}).items():
            _save(self._file(key), {"state": self._states[key], "found": diff})
        if "compose" in answer:
            _save(self.folder / "compose.json", {"states": self._deltas(), "found": answer["compose"]})
        return answer

    def _file(self, key: str) -> Path:
        return self.folder / f"diff-{key}.json"

    @cached_property
    def _states(self) -> dict[str, str]:
        """For each paper a hash of its file, of those that it and BASE import, and of the house below them."""
        files = {key: _digest(record.path.read_bytes()) for key, record in self.papers.items()}
        used = {key: [p for p in record.imports if p in files] for key, record in self.papers.items()}
        below = {BASE, *ancestors(BASE, used)} & files.keys()
        return {
            key: _digest(" ".join([_house(), *(files[k] for k in sorted({key, *ancestors(key, used)} | below))]))
            for key in files
        }

    def _ask(self, request: Any) -> Any:
        return _ask(request, [sys.executable, "-m", "deltax.site.trees"])


def chain(key: str, papers: Mapping[str, Record]) -> list[str] | None:
    """From a whole recipe to this paper, by the X of each: ["gpt", "rope", "yarn"]. None where it changes no recipe."""
    found: list[str] = []
    here: str | None = key
    while here in papers and here not in found:
        if papers[here].kind == "procedure":
            break
        found.append(here)
        if papers[here].kind == "recipe" and here != key:
            break
        here = next((p for p in papers[here].on if p in papers), None)
    if not found or (papers[key].kind == "recipe" and (len(found) == 1 or papers[found[-1]].kind == "delta")):
        return None
    if papers[found[-1]].kind == "delta":
        found.append(BASE)
    return [*reversed(found)] if found[-1] in papers else None


def _ask(request: Any, command: list[str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the recipes took more than {_PATIENCE:.0f} s to build; try again on an idle machine"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the recipes could not be built ({last}); 'dx diff gpt gpt+dyt' says more")
    return json.loads(done.stdout)


@cache
def _house() -> str:
    """Changes when any source file does that recipes are made of, papers apart."""
    house = Path(catalog.__file__).parent
    files = {path.relative_to(house).as_posix(): path for path in house.rglob("*.py")}
    above = ("site/", "library/", "lab/", "papers/", "claims/", "weights/")
    return _digest(" ".join(f"{k} {_digest(files[k].read_bytes())}" for k in sorted(files) if not k.startswith(above)))


def _digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _save(path: Path, value: Any) -> None:
    """Best effort: a cache that cannot be written costs time only."""
    with suppress(OSError), whole(path) as written:
        written.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _diff(steps: list[str]) -> dict[str, Any]:
    """X with and without the last step. A step on the way that X has already, or cannot take, is left out."""
    from deltax.expression import load, recipe
    from deltax.paper import Paper
    from deltax.recipe import diff

    root, *between, last = steps
    before, y = recipe(root), load(last)
    for key in between:
        with suppress(UserError):
            before = before + load(key)
    try:
        after = before + y if isinstance(y, Paper) else y
    except UserError as error:
        return {"missing": str(error)}
    lines = [dict(zip(("path", "a", "b"), line)) for line in diff(before, after)]
    return {"a": before.title, "b": after.title, "command": f"dx diff {before.title} {after.title}", "diff": lines}


def _compose(keys: list[str], known: dict[str, dict[str, str]]) -> dict[str, Any]:
    """`known` is what the table says of pairs that need not be tried again."""
    from deltax.expression import load, recipe

    base = recipe(BASE)
    alone: dict[str, Any] = {}
    deltas = {key: load(key) for key in keys}
    for key, delta in deltas.items():
        try:
            alone[key] = base + delta
        except UserError:
            continue
    found: dict[str, dict[str, str]] = {kind: {} for kind in _PAIRED}
    for a, b in combinations(alone, 2):
        if (pair := f"{a} {b}") in known["pairs"]:
            for kind in _PAIRED:
                found[kind] |= {pair: known[kind][pair]} if pair in known[kind] else {}
            continue
        there, why = _sum(alone[a], deltas[b])
        back, why_back = _sum(alone[b], deltas[a])
        replaces = (there and deltas[a] in deltas[b].replaces) or (back and deltas[b] in deltas[a].replaces)
        if not (there or back):
            found["pairs"][pair] = "excludes"
        else:
            found["pairs"][pair] = "replaces" if replaces else "commutes" if there == back else "composes"
        if bool(there) != bool(back):
            found["orders"][pair] = "forward" if there else "backward"
        if why or why_back:
            found["reasons"][pair] = why or why_back
    return {"base": BASE, "keys": list(alone), **found}


def _sum(tree: Any, delta: Any) -> tuple[Any, str]:
    try:
        return tree + delta, ""
    except UserError as error:
        return None, str(error)


def main() -> None:
    request = json.load(sys.stdin)
    answer: dict[str, Any] = {}
    if "diffs" in request:
        answer["diffs"] = {key: _diff(steps) for key, steps in request["diffs"].items()}
    if "compose" in request:
        answer["compose"] = _compose(**request["compose"])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
