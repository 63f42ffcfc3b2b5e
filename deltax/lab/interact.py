"""Is A + B more, or less, than A times B? (PROTOCOL.md A.2.7)"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

from deltax.errors import UserError
from deltax.expression import load
from deltax.expression import recipe as read
from deltax.lab.compare import compare
from deltax.lab.comparison import Comparison, plain
from deltax.lab.gain import Ladder, log_gains
from deltax.lab.statistics import Difference, Outcome, interaction, verdict
from deltax.recipe import Part


@dataclass(frozen=True)
class Interaction:
    """What two changes do together. `contrast` is ln CEG(A+B) - ln CEG(A) - ln CEG(B), positive where they help.

    Gains are per unit of the budget, and read off one ladder whose slope is taken as known.
    """

    comparison: Comparison
    contrast: Difference

    @property
    def ratio(self) -> float:
        """CEG(A+B) over CEG(A) CEG(B)."""
        return math.exp(self.contrast.mean)

    @property
    def interval(self) -> tuple[float, float]:
        return math.exp(self.contrast.interval.low), math.exp(self.contrast.interval.high)

    @property
    def outcome(self) -> str:
        """ "more than the product", "less than the product", "the product" or "inconclusive (...)"."""
        match verdict(self.contrast, math.log(1.02)).outcome:
            case Outcome.BETTER:
                return "more than the product"
            case Outcome.WORSE:
                return "less than the product"
            case Outcome.EQUIVALENT:
                return "the product, within 2 %"
            case Outcome.NO_VERDICT:
                return f"no verdict (a smoke test of {self.contrast.n} pairs)"
        return f"inconclusive (could have seen a factor of {math.exp(self.contrast.detectable):.2f})"

    def __str__(self) -> str:
        low, high = self.interval
        _, a, b, both = (row.name for row in self.comparison.rows)
        found = f"{self.ratio:.2f} [{low:.2f}, {high:.2f}]"
        return f"{both} against {a} times {b}: {found}, {self.outcome}, at {self.comparison.scale}"

    def to_json(self) -> dict[str, Any]:
        d = self.contrast
        found = {"ratio": self.ratio, "interval": self.interval, "outcome": self.outcome, "p": d.p, "pairs": d.values}
        return {"interaction": plain(found), "said": str(self), "comparison": self.comparison.to_json()}


def interact(x: str | Part, a: Any, b: Any, **settings: Any) -> Interaction:
    """X, X+A, X+B and X+A+B on the same pairs, each tuned alike; settings are those of `compare`.

    x is a recipe; a and b are papers, their keys, or recipes that add papers to x. The contrast needs about twice the
    pairs of a main effect. Raises UserError where a run diverged, or a gain lies beyond X's ladder: there is then no
    number to contrast.
    """
    if settings.get("ladder", "on") != "on":
        raise UserError("an interaction is one of gains, and they need X's ladder: leave it on")
    x = read(x) if isinstance(x, str) else x
    alone, other = _papers(x, a), _papers(x, b)
    add = lambda papers: reduce(Part.__add__, papers, x)
    comparison = compare(x, add(alone), add(other), add(alone + other), **settings)
    if "budgets" not in comparison.ladder:
        raise UserError(f"there are no gains to contrast, for want of X's ladder: {comparison.ladder['missing']}")
    pairs = tuple(range(len(comparison.ladder["losses"])))
    ladder = Ladder(comparison.ladder["budgets"], comparison.ladder["losses"], pairs)
    gains = [log_gains(row.against.difference.values, ladder) for row in comparison.rows if row.against]
    return Interaction(comparison, interaction(*gains))


def _papers(x: Part, change: Any) -> list[Any]:
    if isinstance(change, str):
        return [load(change)]
    if not isinstance(change, Part):
        return [change]
    if change.story[: len(x.story)] != x.story or len(change.story) == len(x.story):
        raise UserError(f"{change.title} adds nothing to {x.title}: write it as in '{x.title}+rope'")
    return [chapter.paper for chapter in change.story[len(x.story) :]]
