"""Learning-rate strips (PROTOCOL.md A.1 "LR fairness"): the same factors for both arms, one tuning seed each."""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike

from deltax.errors import UserError


class Edge(IntEnum):
    """On which side both arms' strips must be extended."""

    LOW = -1
    NONE = 0
    HIGH = 1


@dataclass(frozen=True)
class BestRate:
    """The optimum of one strip, as a factor of the recipe's declared rate. Infinite `loss`: every rate diverged."""

    factor: float
    loss: float
    at_edge: Edge


def best_rate(factors: ArrayLike, losses: ArrayLike) -> BestRate:
    """The optimum by a parabola in log rate through the best point and the neighbours that bracket it.

    A point that diverged (NaN or infinite) cannot carry a parabola: beside one, the best point itself is the optimum.
    So it is at the end of the strip, which `at_edge` says. Of equal losses an inner one is best, then the nearest to 1.
    """
    x, y = _sweep(factors, losses)
    best = min(range(len(x)), key=lambda i: (y[i], i in (0, len(x) - 1), abs(x[i]), x[i]))
    factor, loss = float(np.exp(x[best])), float(y[best])
    if not math.isfinite(loss):
        return BestRate(float(np.exp(x[0])), math.inf, Edge.LOW)
    if best == 0:
        return BestRate(factor, loss, Edge.LOW)
    if best == len(x) - 1:
        return BestRate(factor, loss, Edge.HIGH)
    around = slice(best - 1, best + 2)
    if not np.isfinite(y[around]).all():
        return BestRate(factor, loss, Edge.NONE)
    left, right = x[best - 1] - x[best], x[best + 1] - x[best]
    slope_left, slope_right = (y[best - 1] - loss) / left, (y[best + 1] - loss) / right
    curvature = (slope_right - slope_left) / (right - left)
    if curvature <= 0:
        return BestRate(factor, loss, Edge.NONE)
    slope = slope_left - curvature * left
    shift = -slope / (2 * curvature)
    return BestRate(float(np.exp(x[best] + shift)), loss + slope * shift / 2, Edge.NONE)


def depends_on_rate(x_losses: ArrayLike, y_losses: ArrayLike) -> bool:
    """Whether Y - X changes its sign over the common rates, losses aligned by factor (section H.3's red tag).

    A diverged run is worse than any other; rates at which both diverged, or tie, say nothing.
    """
    x, y = (np.asarray(a, float) for a in (x_losses, y_losses))
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"both strips need the same rates, not shapes {x.shape} and {y.shape}")
    x, y = (np.where(np.isfinite(a), a, np.inf) for a in (x, y))
    return bool((y > x).any() and (y < x).any())


def _sweep(factors: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    factors, losses = (np.asarray(a, float).ravel() for a in (factors, losses))
    if len(factors) != len(losses) or len(factors) < 3:
        raise UserError(f"a strip needs at least 3 rates with a loss each, not {len(factors)} and {len(losses)}")
    if not (np.isfinite(factors) & (factors > 0)).all() or len(np.unique(factors)) < len(factors):
        raise UserError("the factors of a strip must be positive and differ from each other")
    order = np.argsort(factors)
    losses = losses[order]
    return np.log(factors[order]), np.where(np.isfinite(losses), losses, np.inf)
