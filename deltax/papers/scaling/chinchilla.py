"""Training Compute-Optimal Large Language Models. Hoffmann, Borgeaud, Mensch, Buchatskaya, Cai, Rutherford, et al.,
2022. arXiv:2203.15556

A GPT, but its parameters and its training tokens grow together as compute grows, each about as its square root.

Earlier laws read the losses of small models off the middle of long runs, under a learning rate that was still high, and
concluded that compute should mostly buy parameters. With a schedule that ends where each run ends, compute buys both
alike. Loss is what text will never tell, plus what too few parameters miss, plus what too few tokens miss; at a given
budget the last two trade off, and the optimum is in closed form. The printed coefficients are rounded and, with the
fit stopped early for want of a well-scaled objective, biased: `PRINTED` gives 32B parameters for Gopher's compute.
`REFITTED` is the same fit to the same runs by Besiroglu et al. (arXiv:2404.10102).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize, stats

from deltax import UserError, paper
from deltax.papers.language.models.gpt import gpt

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Law:
    """loss = E + A / N^alpha + B / D^beta, in nats a token, for N parameters and D training tokens (Eq. 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """a in N_opt ~ C^a; tokens grow with 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, flops: np.ndarray | float) -> tuple[np.ndarray | float, np.ndarray | float]:
        """(parameters, tokens) of least loss where 6 N D = flops (Eq. 4)."""
        both = flops / 6
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return scale * both**self.exponent, both ** (1 - self.exponent) / scale


PRINTED = Law(1.69, 406.4, 410.7, 0.34, 0.28)
REFITTED = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


@paper(on=gpt, year=2022, arxiv="2203.15556")
def fit(parameters: Numbers, tokens: Numbers, losses: Numbers, *, delta: float = 1e-3) -> Law:
    """The law of some finished runs, one number of each kind a run (approach 3, section 3.3 and appendix D.3).

    Least Huber loss of log L - logsumexp(log A - alpha log N, log B - beta log D, log E), by L-BFGS from the most
    promising of the paper's 4,500 starts. Raises UserError for fewer than 6 runs, or numbers that are not above zero.
    """
    n, d, l = (np.asarray(x, dtype=float) for x in (parameters, tokens, losses))
    if not n.shape == d.shape == l.shape or n.size < 6:
        raise UserError(f"five coefficients need six runs, each with all three numbers, not {n.size, d.size, l.size}")
    if not all((x > 0).all() and np.isfinite(x).all() for x in (n, d, l)):
        raise UserError("parameters, tokens and losses must be finite and above zero: leave out runs that diverged")
    x, y, z = np.log(n), np.log(d), np.log(l)
    # Heights of the two terms at the middle of the data instead of at N = D = 1, where they all but fix the slopes.
    x_mid, y_mid = x.mean(), y.mean()

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _huber(at[None], x - x_mid, y - y_mid, z, delta)
        return float(value[0]), gradient[0]

    slopes, heights, floors = np.arange(0, 2.1, 0.5), np.arange(0, 26, 5), np.arange(-1, 1.1, 0.5)
    starts = product(slopes, slopes, heights, heights, floors)
    grid = np.array([(a - s * x_mid, b - t * y_mid, e, s, t) for s, t, a, b, e in starts])
    promising = grid[np.argsort(_huber(grid, x - x_mid, y - y_mid, z, delta)[0])[:8]]
    tight = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    ends = [optimize.minimize(objective, at, jac=True, method="L-BFGS-B", options=tight) for at in promising]
    a, b, e, alpha, beta = min(ends, key=lambda end: end.fun).x
    return Law(*(float(c) for c in (np.exp(e), np.exp(a + alpha * x_mid), np.exp(b + beta * y_mid), alpha, beta)))


def _huber(at: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Huber(log L - predicted) / delta summed over runs, and its gradient, at each row (a, b, e, alpha, beta) of at."""
    a, b, e, alpha, beta = at.T[..., None]
    terms = np.stack([a - alpha * x, b - beta * y, np.broadcast_to(e, (len(at), len(x)))])
    top = terms.max(0)
    predicted = top + np.log(np.exp(terms - top).sum(0))
    off = predicted - z
    small = np.abs(off) <= delta
    value = np.where(small, off**2 / (2 * delta), np.abs(off) - delta / 2).sum(1)
    pull = np.clip(off / delta, -1, 1)
    by_n, by_d, floor = pull * np.exp(terms - predicted)
    return value, np.stack([by_n.sum(1), by_d.sum(1), floor.sum(1), -(by_n * x).sum(1), -(by_d * y).sum(1)], -1)


@dataclass(frozen=True)
class IsoFlop:
    """What profiles of equal compute say (approach 2, section 3.2).

    budgets   (P,) the compute of each profile
    optima    (P,) the number of parameters at the bottom of each parabola; nan where it opens downwards
    interior  whether every bottom lies between the smallest and the largest model of its profile
    exponent  a in N_opt ~ C^a
    interval  where a lies, at the level asked for
    """

    budgets: np.ndarray
    optima: np.ndarray
    interior: bool
    exponent: float
    interval: tuple[float, float]


def isoflop(flops: Numbers, parameters: Numbers, losses: Numbers, *, level: float = 0.95) -> IsoFlop:
    """A parabola in log N for each budget, and a line through the logarithms of their bottoms.

    The interval is by the delta method: the residuals of all parabolas, pooled, give the variance of a loss, that gives
    the variance of each bottom and of the slope, with t at as many degrees of freedom as there are runs less
    coefficients. Raises UserError for fewer than two budgets, a budget of fewer than 3 sizes, or no run to spare.
    """
    c, n, l = (np.asarray(x, dtype=float) for x in (flops, parameters, losses))
    budgets = np.unique(c)
    free = len(c) - 3 * len(budgets)
    if len(budgets) < 2 or min((c == b).sum() for b in budgets) < 3 or free < 1:
        raise UserError("a profile needs 3 sizes, an exponent 2 profiles, and an interval one run to spare: give more")
    squares, bottoms, shapes, inside = 0.0, [], [], []
    for budget in budgets:
        x, y = np.log(n[c == budget]), l[c == budget]
        middle = x.mean()
        design = np.vander(x - middle, 3, increasing=True)
        found = np.linalg.lstsq(design, y)[0]
        squares += float(((y - design @ found) ** 2).sum())
        _, slope, bend = found
        bottom = -slope / (2 * bend)
        toward = np.array([0.0, -1 / (2 * bend), slope / (2 * bend**2)])
        shapes.append(toward @ np.linalg.inv(design.T @ design) @ toward)
        bottoms.append(bottom + middle if bend > 0 else np.nan)
        inside.append(bool(bend > 0 and x.min() < bottom + middle < x.max()))
    from_middle = np.log(budgets) - np.log(budgets).mean()
    weights = from_middle / (from_middle**2).sum()
    exponent = float(weights @ bottoms)
    error = float(np.sqrt(squares / free * (weights**2 @ np.array(shapes))))
    half = float(stats.t.ppf(0.5 + level / 2, free)) * error
    return IsoFlop(budgets, np.exp(bottoms), all(inside), exponent, (exponent - half, exponent + half))
