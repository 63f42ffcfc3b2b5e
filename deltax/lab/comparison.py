"""What a comparison found: rows, verdicts as claims take them, and all of it as JSON for reports and the store."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from deltax.claim import Outcome as ClaimOutcome
from deltax.claim import Verdict as ClaimVerdict
from deltax.contract import looks_ahead
from deltax.lab.gain import Gain, Position
from deltax.lab.measure import Cost
from deltax.lab.plan import FACTORS, TUNING_SEED, Plan, command, pair_seeds
from deltax.lab.rates import Edge
from deltax.lab.statistics import Difference, Outcome, Verdict, asked_margin
from deltax.lab.tuning import Sweep, Tuned
from deltax.recipe import diff, to_json

POINTS = 60


@dataclass(frozen=True)
class Against:
    """What one Y came to against X. Differences are Y - X in the task's unit, lower is better.

    adjusted_p  Holm's over all Y
    detectable  the smallest true difference that would have been found with 80 % power at Holm's strictest level
    gains       compute-equivalent gain per "token", "flop" and "second"; empty without a ladder
    shared      (factor of the declared rate, difference there) on the tuning seed: one seed, no interval
    flips       whether the sign of that difference depends on the factor
    """

    difference: Difference
    adjusted_p: float
    verdict: Verdict
    detectable: float
    gains: dict[str, Gain]
    shared: tuple[float, float]
    flips: bool

    def sentence(self, unit: str) -> str:
        """The verdict in words, without its scale."""
        d = self.difference
        match self.verdict.outcome:
            case Outcome.BETTER | Outcome.WORSE as outcome if d.diverged:
                return (
                    f"{outcome.value} (diverged in {d.diverged_y} of {d.n} pairs, the first recipe in {d.diverged_x})"
                )
            case Outcome.BETTER | Outcome.WORSE as outcome:
                return outcome.value
            case Outcome.EQUIVALENT:
                return f"equivalent (within ±{self.verdict.margin:.2g} {unit}{self._as_gain(self.verdict.margin)})"
            case Outcome.NO_VERDICT:
                return f"no verdict (a smoke test of {self.difference.n} pairs)"
        if d.diverged:
            needed = next(n for n in range(2, 99) if 2.0 ** (1 - n) <= 1 - d.interval.level)
            few = f"; the sign test of the others takes {needed} pairs at least" if d.n < needed else ""
            return f"inconclusive ({d.diverged} of {d.n} pairs diverged{few})"
        return f"inconclusive (could have seen ≥ {self.detectable:.2g} {unit}{self._as_gain(self.detectable)})"

    def _as_gain(self, difference: float) -> str:
        slope = next((abs(g.slope) for g in self.gains.values() if g.slope < 0), 0)
        return f", {100 * math.expm1(difference / slope):.2g} % of compute" if slope else ""


@dataclass(frozen=True)
class Row:
    """One recipe of a comparison. `scores` has NaN where a run diverged; `against` is None for X.

    curve  (tokens, mean, lowest, highest) of the training loss over the pairs, nats
    """

    tuned: Tuned
    scores: tuple[float, ...]
    curve: tuple[tuple[float, float, float, float], ...]
    cost: Cost
    tokens_per_second: float
    against: Against | None = None

    @property
    def name(self) -> str:
        return self.tuned.arm.name

    @property
    def diverged(self) -> int:
        return sum(not math.isfinite(score) for score in self.scores)

    @property
    def score(self) -> float:
        """The mean over the pairs; NaN when a run diverged."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Comparison:
    """A finished comparison. The first row is X.

    ladder     X's own strips and losses at other budgets, or the sentence that says why there are none
    spent      training FLOPs and runs of each phase
    earlier    comparisons on this evaluation data before this one
    pictures   of each row by its name, captions with SVG: what its first pair's run makes of held-out pictures
    """

    plan: Plan
    rows: tuple[Row, ...]
    ladder: dict[str, Any]
    spent: dict[str, dict[str, float]]
    environment: dict[str, Any]
    earlier: int
    pictures: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        return self.plan.scale

    @property
    def better(self) -> ClaimVerdict:
        """Whether the second recipe is better than the first."""
        return self._claim(
            {Outcome.BETTER: "supported at this scale", Outcome.WORSE: "opposite at this scale"}.get(
                self._against.verdict.outcome,
                "not seen at this scale" if self._against.verdict.outcome is Outcome.EQUIVALENT else "inconclusive",
            )
        )

    @property
    def no_worse(self) -> ClaimVerdict:
        """Whether the second recipe is at most the equivalence margin worse than the first: the interval decides."""
        return self._claim(self._within(lambda margin: (-math.inf, margin)))

    @property
    def equivalent(self) -> ClaimVerdict:
        """Whether the difference lies within the equivalence margin: the interval decides."""
        return self._claim(self._within(lambda margin: (-margin, margin)))

    @property
    def _against(self) -> Against:
        assert self.rows[1].against
        return self.rows[1].against

    def _within(self, bounds: Callable[[float], tuple[float, float]]) -> ClaimOutcome:
        """Whether the interval lies inside the bounds that a margin gives; beyond them only by the margin asked for.

        Noise widens the margin inside which a difference is too small to matter; it excuses none that is seen.
        """
        found = self._against
        if found.verdict.outcome is Outcome.NO_VERDICT:
            return "inconclusive"
        interval = found.difference.interval
        if found.difference.diverged:
            return "opposite at this scale" if found.verdict.outcome is Outcome.WORSE else "inconclusive"
        low, high = bounds(found.verdict.margin)
        if low <= interval.low and interval.high <= high:
            return "supported at this scale"
        low, high = bounds(asked_margin(found.gains["token"].slope) if "token" in found.gains else 0.0)
        return "opposite at this scale" if interval.low > high or interval.high < low else "inconclusive"

    def _claim(self, outcome: ClaimOutcome) -> ClaimVerdict:
        found = self._against
        d = found.difference
        numbers = {
            "against": self.rows[0].name,
            "recipe": self.rows[1].name,
            "pairs": d.n,
            "diverged": d.diverged,
            "p_win": d.p_win,
            "margin": found.verdict.margin,
            "rates": [row.tuned.lr_scale for row in self.rows[:2]],
            "depends_on_the_rate": found.flips,
            "looks_ahead": looks_ahead(self.rows[1].tuned.arm.recipe),
            **{f"gain_per_{unit}": plain(gain) for unit, gain in found.gains.items()},
        }
        finite = not d.diverged
        return ClaimVerdict(
            outcome,
            self.scale,
            estimate=d.mean if finite else None,
            interval=(d.interval.low, d.interval.high) if finite else None,
            unit=self.plan.unit,
            could_have_seen=found.detectable if finite else None,
            numbers=plain(numbers),
        )

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: what is not finite is null. All that reports and tables need is in it."""
        plan, x = self.plan, self.rows[0].tuned.arm.recipe
        return plain(
            {
                "id": plan.id,
                "command": command(plan),
                "scale": self.scale,
                "unit": plan.unit,
                "plan": plan.sentences(),
                "budget": {**asdict(plan.budget), "shown": str(plan.budget)},
                "pairs": len(self.rows[0].scores),
                "level": plan.level(len(self.rows[0].scores)),
                "seeds": {"tuning": TUNING_SEED, "pairs": list(pair_seeds(len(self.rows[0].scores)))},
                "factors": FACTORS,
                "rows": [_row(row, x, plan.unit) for row in self.rows],
                "ladder": self.ladder,
                "spent": self.spent,
                "environment": self.environment,
                "earlier": self.earlier,
                "pictures": self.pictures,
            }
        )


def plain(value: Any) -> Any:
    """Data that strict JSON can hold."""
    if isinstance(value, Gain):
        inside = value.position is Position.INSIDE
        found = {"value": value.value if inside else None, "low": value.interval.low, "high": value.interval.high}
        return plain({**found, "position": value.position, "shown": str(value), "slope": value.slope})
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def curve(losses: Sequence[Sequence[tuple[int, float]]], tokens_per_step: int) -> tuple[tuple[float, ...], ...]:
    """(tokens, mean, lowest, highest) of several runs' training losses, in at most 60 bins of steps."""
    finite = [[(step, loss) for step, loss in run if math.isfinite(loss)] for run in losses]
    last = max((step for run in finite for step, _ in run), default=0) + 1
    width = max(1, -(-last // POINTS))
    points = []
    for start in range(0, last, width):
        means = [np.mean(inside) for run in finite if (inside := [v for s, v in run if start <= s < start + width])]
        if means:
            middle = (start + min(start + width, last)) / 2 * tokens_per_step
            points.append((middle, float(np.mean(means)), float(min(means)), float(max(means))))
    return tuple(points)


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    edge = sweep.best.at_edge
    return {"factors": sweep.factors, "losses": sweep.losses, "best": sweep.factor, "at_edge": edge is not Edge.NONE}


def _row(row: Row, x: Any, unit: str) -> dict[str, Any]:
    recipe = row.tuned.arm.recipe
    found = {
        "name": row.name,
        "id": recipe.id,
        "recipe": to_json(recipe),
        "steps": row.tuned.arm.steps,
        "tokens": row.tuned.arm.tokens,
        "flops": row.tuned.arm.flops,
        "rate": row.tuned.lr_scale,
        "strip": sweep_json(row.tuned.sweep),
        "knob": row.tuned.knob,
        "second": sweep_json(row.tuned.second) if row.tuned.second else None,
        "scores": row.scores,
        "score": row.score,
        "diverged": row.diverged,
        "looks_ahead": looks_ahead(recipe),
        "curve": row.curve,
        "cost": row.cost.to_json(),
        "tokens_per_second": row.tokens_per_second,
        "changes": diff(x, recipe),
        "against": None,
    }
    if row.against:
        d = row.against.difference
        found["against"] = {
            "differences": d.values,
            "mean": d.mean,
            "low": d.interval.low,
            "high": d.interval.high,
            "level": d.interval.level,
            "method": d.method,
            "sd": d.sd,
            "evaluation_se": d.evaluation_se,
            "p": d.p,
            "divergence_p": d.divergence_p,
            "adjusted_p": row.against.adjusted_p,
            "p_win": d.p_win,
            "sign_flip_p": d.sign_flip_p,
            "sign_flip_floor": d.sign_flip_floor,
            "detectable": row.against.detectable,
            "margin": row.against.verdict.margin,
            "outcome": row.against.verdict.outcome,
            "sentence": row.against.sentence(unit),
            "gains": row.against.gains,
            "shared": {"factor": row.against.shared[0], "difference": row.against.shared[1]},
            "flips": row.against.flips,
        }
    return found
