"""Compute-equivalent gain with its uncertainty, and speed ratios (PROTOCOL.md A.2 and A.1 "Budget").

    ladder = ComputeLadder((0.5, 1, 2), losses, pairs=(0, 1, 2))   X at each budget, its own full schedule, 3+ seeds
    per_flop = gain(differences, ladder)                    how much more budget X needs to meet Y
    per_second = per_flop.times(speed_ratio(x_seconds, y_seconds))
    per_token = per_flop.times(exactly(y_flops_per_token / x_flops_per_token))

The gain is per unit of the budget that the pairs shared; `times` turns it into another unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from deltax.errors import UserError
from deltax.lab.statistics import Interval, Prior, moderate, t_quantile

_GRID = 129


class Position(Enum):
    """Where Y's loss lies against X's ladder."""

    INSIDE = "inside"
    ABOVE = "above"
    BELOW = "below"
    UNRESOLVED = "unresolved"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Ratio:
    """A measured (or exactly known) ratio of two costs, and how its interval was made."""

    value: float
    interval: Interval
    method: str


@dataclass(frozen=True)
class ComputeLadder:
    """X's final losses, nats, at multiples of the common budget B (A.2.1).

    budgets: (k,), rising, with 1 among them. losses: (m, k), a row for each seed. pairs: for each row, the index of
    the pair whose X run it shares at 1; empty when the ladder was trained on seeds of its own.
    """

    budgets: Sequence[float]
    losses: Sequence[Sequence[float]]
    pairs: Sequence[int] = ()

    def __post_init__(self):
        budgets, losses = np.asarray(self.budgets, float), np.asarray(self.losses, float)
        if budgets.ndim != 1 or 1 not in budgets or len(budgets) < 2 or not (np.diff(np.r_[0, budgets]) > 0).all():
            raise UserError(f"a ladder's budgets rise from above 0 and include 1, unlike {self.budgets}")
        if losses.ndim != 2 or losses.shape[1] != len(budgets) or len(losses) < 2:
            raise UserError(f"a ladder needs at least 2 seeds at each of {len(budgets)} budgets, not {losses.shape}")
        if not np.isfinite(losses).all():
            raise UserError("X diverged on its ladder: lower its rate there, or leave the ladder off")
        if len(set(self.pairs)) < len(self.pairs) or len(self.pairs) not in (0, len(losses)):
            raise UserError(f"a ladder of {len(losses)} seeds names as many different pairs or none, not {self.pairs}")
        object.__setattr__(self, "budgets", tuple(budgets.tolist()))
        object.__setattr__(self, "losses", tuple(map(tuple, losses.tolist())))
        object.__setattr__(self, "pairs", tuple(int(p) for p in self.pairs))

    @property
    def seeds(self) -> int:
        return len(self.losses)

    @cached_property
    def rungs(self) -> np.ndarray:
        """ln budget, (k,)."""
        return np.log(self.budgets)

    @property
    def base(self) -> int:
        return self.budgets.index(1.0)

    @cached_property
    def relative(self) -> np.ndarray:
        """Each seed's loss at each rung, less its own loss at 1, (m, k)."""
        losses = np.asarray(self.losses)
        return losses - losses[:, [self.base]]

    def at(self, log_budget: ArrayLike) -> np.ndarray:
        """`relative`, piecewise linear in ln budget between the rungs, (m, points)."""
        return np.stack([np.interp(np.atleast_1d(log_budget), self.rungs, row) for row in self.relative])

    def slopes(self, segment: int) -> np.ndarray:
        """Each seed's nats per e-fold of compute between rungs `segment` and `segment` + 1, (m,)."""
        return np.diff(self.relative, axis=1)[:, segment] / np.diff(self.rungs)[segment]


@dataclass(frozen=True)
class Gain:
    """A multiple of the budget. `value` is NaN unless Y lies inside the ladder, whose ends are `low` and `high`.

    `interval` is open (0 or infinite) on a side where it would have to leave the ladder. `slope` is X's, nats per
    e-fold of compute, in the ladder's interval that contains Y.
    """

    value: float
    interval: Interval
    slope: float
    position: Position
    low: float
    high: float

    def times(self, ratio: Ratio) -> "Gain":
        """The gain per another unit (A.2.3): logs add, and so do the squared distances to each end of the intervals.

        That is adding log-variances, kept exact for intervals that are not symmetric (Zou and Donner 2008, Eq. 5).
        """
        if self.position is Position.INSIDE:
            value = self.value * ratio.value
            spreads = [
                math.hypot(_log(mine) - math.log(self.value), math.log(its) - math.log(ratio.value))
                for mine, its in zip(_ends(self.interval), _ends(ratio.interval), strict=True)
            ]
            interval = Interval(value * math.exp(-spreads[0]), value * math.exp(spreads[1]), self.interval.level)
        else:
            value = math.nan
            low, high = (a * b for a, b in zip(_ends(self.interval), _ends(ratio.interval), strict=True))
            interval = Interval(low, high, self.interval.level)
        return Gain(value, interval, self.slope, self.position, self.low * ratio.value, self.high * ratio.value)

    def __str__(self) -> str:
        match self.position:
            case Position.INSIDE:
                return f"{self.value:.2f} [{self.interval.low:.2f}, {self.interval.high:.2f}]"
            case Position.ABOVE:
                return f"> {self.high:.3g} (beyond the ladder)"
            case Position.BELOW:
                return f"< {self.low:.3g} (beyond the ladder)"
            case Position.DIVERGED:
                return "diverged"
        return "unresolved (X's slope is within its noise: add ladder seeds)"


def gain(differences: ArrayLike, ladder: ComputeLadder, level: float = 0.95, prior: Prior | None = None) -> Gain:
    """How many times the budget X needs to meet Y's loss, from n >= 2 pair differences Y - X in nats (A.2.2 - A.2.4).

    ln CEG = Δ / b, read off the piecewise-linear ladder. The interval is Fieller's, found as he derived it: it holds
    every ln CEG = θ at which a t test does not tell the mean difference from what X gains from e^θ times the budget.
    Inside one interval of the ladder that is the quadratic in Δ - θ b; across a rung each side has its own slope. It
    never leaves the ladder: an end that would is open. Where X's slope is not told from zero (t, m - 1 df) there is no
    bound at all, and none either when a run of a pair diverged.
    """
    d = np.asarray(differences, float).ravel()
    if len(d) < 2 or any(p not in range(len(d)) for p in ladder.pairs):
        raise UserError(f"a gain needs at least 2 pairs, and the ladder's among them, not {len(d)} and {ladder.pairs}")
    ends = ladder.budgets[0], ladder.budgets[-1]
    unbounded = Interval(0.0, math.inf, level)
    if not np.isfinite(d).all():
        return Gain(math.nan, unbounded, math.nan, Position.DIVERGED, *ends)
    theta, segment, position = _place(d.mean(), ladder)
    slopes = ladder.slopes(segment)
    slope, error = slopes.mean(), slopes.std(ddof=1) / math.sqrt(ladder.seeds)
    if slope + t_quantile(level, ladder.seeds - 1) * error >= 0:
        return Gain(math.nan, unbounded, float(slope), Position.UNRESOLVED, *ends)
    value = math.exp(theta) if position is Position.INSIDE else math.nan
    return Gain(value, _interval(d, ladder, theta, level, prior), float(slope), position, *ends)


def log_gains(differences: ArrayLike, ladder: ComputeLadder) -> np.ndarray:
    """ln CEG of each pair alone, off the ladder's mean curve, (n,); NaN beyond the ladder. For `interaction`."""
    places = [_place(d, ladder) for d in np.asarray(differences, float).ravel()]
    return np.array([theta if position is Position.INSIDE else math.nan for theta, _, position in places])


def exactly(value: float) -> Ratio:
    """A ratio known without error, such as one of counted FLOPs."""
    if not 0 < value < math.inf:
        raise UserError(f"a ratio of costs is positive and finite, not {value}")
    return Ratio(value, Interval(value, value, 1.0), "exact")


def speed_ratio(x_seconds: ArrayLike, y_seconds: ArrayLike, level: float = 0.95) -> Ratio:
    """X's seconds over Y's for equal work (above 1: Y is faster): the median over n interleaved X, Y blocks (A.1).

    The interval is the order statistics' (the sign test's), which assumes no distribution, where n reaches the level
    (6 blocks for 95 %), else a t interval of log ratios.
    """
    x, y = (np.asarray(a, float).ravel() for a in (x_seconds, y_seconds))
    if len(x) != len(y) or len(x) < 2 or not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise UserError(f"a speed ratio needs 2 or more blocks of each, in positive seconds, not {len(x)} and {len(y)}")
    ratios, n = np.sort(x / y), len(x)
    median = float(np.median(ratios))
    cut = int(np.sum(2 * special.bdtr(np.arange(n // 2), n, 0.5) <= 1 - level))
    if cut:
        interval = Interval(float(ratios[cut - 1]), float(ratios[n - cut]), level)
        return Ratio(median, interval, "median, order statistics")
    logs = np.log(ratios)
    half = t_quantile(level, n - 1) * logs.std(ddof=1) / math.sqrt(n)
    interval = Interval(math.exp(logs.mean() - half), math.exp(logs.mean() + half), level)
    return Ratio(median, interval, "median, t of log ratios")


def _place(delta: float, ladder: ComputeLadder) -> tuple[float, int, Position]:
    """ln CEG, the interval of the ladder that holds it (the last one beyond the ladder), and whether it lies inside."""
    curve, rungs, base = ladder.relative.mean(0), ladder.rungs, ladder.base
    last = len(rungs) - 2
    up = delta < 0 or (delta == 0 and base <= last)
    for j in range(base, last + 1) if up else range(base - 1, -1, -1):
        start, end = curve[j], curve[j + 1]
        if (end <= delta) if up else (start >= delta):
            part = (delta - start) / (end - start) if end != start else 0.0
            return float(rungs[j] + part * (rungs[j + 1] - rungs[j])), j, Position.INSIDE
    return (math.inf, last, Position.ABOVE) if up else (-math.inf, 0, Position.BELOW)


def _interval(d: np.ndarray, ladder: ComputeLadder, theta: float, level: float, prior: Prior | None) -> Interval:
    n, m = len(d), ladder.seeds
    variance, df = moderate(float(d.var(ddof=1)), n - 1, prior)
    of_delta = variance / n
    shared = list(ladder.pairs)

    def excess(t: ArrayLike) -> np.ndarray:
        """Above 0 where ln CEG = t is rejected."""
        e = ladder.at(t)
        sd_e = e.std(0, ddof=1)
        # Δ and the ladder share X's runs at 1 when they share pairs: the covariance of their means is r s_d s_e / n,
        # with r estimated over those pairs, which keeps the variance of the contrast positive.
        covariance = _correlation(d[shared], e) * math.sqrt(variance) * sd_e / n if shared else 0.0
        of_ladder = sd_e**2 / m - 2 * covariance
        # Degrees of freedom go from those of Δ to those of the ladder as its share of the variance grows, as if both
        # variance estimates erred together, which is Satterthwaite's formula at its most cautious.
        parts = of_delta + np.abs(of_ladder)
        errors = of_delta / math.sqrt(df) + np.abs(of_ladder) / math.sqrt(m - 1)
        freedom = (np.divide(parts, errors, out=np.full_like(parts, math.sqrt(df)), where=errors > 0)) ** 2
        spread = np.sqrt(np.maximum(of_delta + of_ladder, 0))
        return np.abs(d.mean() - e.mean(0)) - t_quantile(level, freedom) * spread

    first, last = ladder.rungs[0], ladder.rungs[-1]
    grid = np.unique(np.r_[np.linspace(first, last, _GRID), ladder.rungs, np.clip(theta, first, last)])
    kept = (excess(grid) <= 0) | (grid == theta)
    if not kept.any():
        return Interval(math.exp(last), math.inf, level) if theta > 0 else Interval(0.0, math.exp(first), level)
    lowest, highest = np.flatnonzero(kept)[[0, -1]]

    def edge(inside: float, outside: float) -> float:
        if excess(inside)[0] >= 0:
            return math.exp(inside)
        return math.exp(optimize.brentq(lambda t: excess(t)[0], inside, outside, xtol=1e-12))

    low = edge(grid[lowest], grid[lowest - 1]) if lowest > 0 else 0.0
    high = edge(grid[highest], grid[highest + 1]) if highest < len(grid) - 1 else math.inf
    return Interval(low, high, level)


def _correlation(d: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Of d (m,) with each column of e (m, points); 0 where either is constant."""
    d, e = d - d.mean(), e - e.mean(0)
    scale = np.sqrt((d**2).sum() * (e**2).sum(0))
    return np.divide(d @ e, scale, out=np.zeros_like(scale), where=scale > 0)


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
