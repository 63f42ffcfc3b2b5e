"""A measured claim cut short: whether it runs, and nothing of whether it holds."""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from deltax import catalog
from deltax.claim import Verdict
from deltax.lab.lab import Lab, Ratio, Trained
from deltax.lab.store import Store
from deltax.recipe import Part

STEPS = 2


class Rehearsal(Lab):
    """A lab that trains two steps, of two seeds, and times three calls."""

    def seeds(self, n: int) -> range:
        return super().seeds(min(n, 2))

    def train(self, recipe: str | Part, *, steps: int | None = None, **options: Any) -> Trained:
        return super().train(recipe, steps=min(STEPS, steps or STEPS), **options)

    def compare(self, x: str | Part, y: str | Part, **options: Any) -> Any:
        tokens = STEPS * max(self.task(r).tokens(self.recipe(r)["loop.batch"]) for r in (x, y))
        return super().compare(x, y, **{**options, "budget": f"{tokens} tokens", "pairs": 2, "ladder": "off"})

    def ratio(self, fast: Callable[[], Any], slow: Callable[[], Any], *, repeats: int = 3) -> Ratio:
        return super().ratio(fast, slow, repeats=min(repeats, 3))


def rehearse(key: str, *, only: str | None = None, **lab: Any) -> Iterator[tuple[str, str | None]]:
    """Run a paper's measured claims cut short, in a store of their own; keep nothing. `lab` as for `Lab`.

    Gives each claim's name and what went wrong in it, None where it came to a verdict. What a claim does by itself,
    not through the lab, takes its usual time.
    """
    record = catalog.find(key)
    module = importlib.import_module(record.claims_module)
    for claim in record.claims:
        if claim.kind == "measured" and claim.is_asked(only):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    verdict = getattr(module, claim.name)(Rehearsal(Store(folder), **lab))
                    yield claim.name, None if isinstance(verdict, Verdict) else f"it returned {verdict!r}, no Verdict"
                except Exception as error:
                    yield claim.name, f"{type(error).__name__}: {error}"
