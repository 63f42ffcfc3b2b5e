"""Is A + B more, or less, than A times B? (PROTOCOL.md A.2.7)"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from deltax.errors import UserError
from deltax.expression import load
from deltax.expression import recipe as read
from deltax.lab.compare import compare
from deltax.lab.comparison import Comparison, plain
from deltax.lab.gain import ComputeLadder, log_gains
from deltax.lab.statistics import Difference, Outcome, interaction, paired, verdict
from deltax.recipe import Part


@dataclass(frozen=True)
class Interaction:
    """What two changes do together. `contrast` is ln CEG(A+B) - ln CEG(A) - ln CEG(B), positive where they help.

    Gains are per unit of the budget, and read off one ladder whose slope is taken as known.
    """

    comparison: Comparison
    contrast: Difference
    bound = "product"

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
        match verdict(self.contrast, self._margin).outcome:
            case Outcome.BETTER:
                return f"more than the {self.bound}"
            case Outcome.WORSE:
                return f"less than the {self.bound}"
            case Outcome.EQUIVALENT:
                return "the product, within 2 %"
            case Outcome.NO_VERDICT:
                return f"no verdict (a smoke test of {self.contrast.n} pairs)"
        return f"inconclusive (could have seen {self._detectable})"

    @property
    def _margin(self) -> float:
        return math.log(1.02)

    @property
    def _detectable(self) -> str:
        return f"a factor of {math.exp(self.contrast.detectable):.2f}"

    def __str__(self) -> str:
        low, high = self.interval
        _, a, b, both = (row.name for row in self.comparison.rows)
        found = f"{self.ratio:.2f} [{low:.2f}, {high:.2f}]"
        return f"{both} against {a} times {b}: {found}, {self.outcome}, at {self.comparison.scale}"

    def to_json(self) -> dict[str, Any]:
        d = self.contrast
        found = {"outcome": self.outcome, "p": d.p, "pairs": d.values, **self._figures()}
        return {"interaction": plain(found), "said": str(self), "comparison": self.comparison.to_json()}

    def _figures(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "interval": self.interval}


class LossInteraction(Interaction):
    """The contrast of losses, where a gain lies beyond the ladder and has no number: below 0 where they help.

    (A+B) - A - B, each less X, in the task's unit. On a ladder of one slope that is the contrast of log gains, scaled,
    so it has that one's sign.
    """

    bound = "sum"
    ratio = property(lambda self: math.nan)

    @property
    def interval(self) -> tuple[float, float]:
        return self.contrast.interval.low, self.contrast.interval.high

    @property
    def _margin(self) -> float:
        return 0.0

    @property
    def _detectable(self) -> str:
        return f"{self.contrast.detectable:.2g} {self.comparison.plan.unit}"

    def __str__(self) -> str:
        low, high = self.interval
        _, a, b, both = (row.name for row in self.comparison.rows)
        found = f"{self.contrast.mean:+.4f} {self.comparison.plan.unit} [{low:+.4f}, {high:+.4f}]"
        beyond = "losses, as a pair's gain lies beyond the ladder"
        return f"{both} against {a} plus {b}: {found}, {self.outcome} ({beyond}), at {self.comparison.scale}"

    def _figures(self) -> dict[str, Any]:
        return {"difference": self.contrast.mean, "unit": self.comparison.plan.unit, "interval": self.interval}


def interact(x: str | Part, a: Any, b: Any, **settings: Any) -> Interaction:
    """X, X+A, X+B and X+A+B on the same pairs, each tuned alike; settings are those of `compare`.

    x is a recipe; a and b are papers, their keys, or recipes that add papers to x. The contrast needs about twice the
    pairs of a main effect. Where a pair's gain lies beyond X's ladder, losses are contrasted instead. Raises UserError
    where a run diverged: there is then no number to contrast.
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
    ladder = ComputeLadder(comparison.ladder["budgets"], comparison.ladder["losses"], pairs)
    found = [np.array(row.against.difference.values) for row in comparison.rows if row.against]
    if not np.isfinite(found).all():
        raise UserError("a run diverged, so there is nothing to contrast: lower the rate of what diverged")
    gains = [log_gains(differences, ladder) for differences in found]
    if np.isfinite(gains).all():
        return Interaction(comparison, interaction(*gains))
    alone_a, alone_b, together = found
    return LossInteraction(comparison, paired(together - alone_a - alone_b))


def _papers(x: Part, change: Any) -> list[Any]:
    if isinstance(change, str):
        return [load(change)]
    if not isinstance(change, Part):
        return [change]
    if change.history[: len(x.history)] != x.history or len(change.history) == len(x.history):
        raise UserError(f"{change.title} adds nothing to {x.title}: write it as in '{x.title}+rope'")
    return [applied.paper for applied in change.history[len(x.history) :]]
