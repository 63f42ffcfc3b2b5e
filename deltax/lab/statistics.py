"""The statistics of a fair comparison, as pure functions of numbers (PROTOCOL.md sections A.1, D and I).

    d = paired(differences(x_losses, y_losses))     the mean of Y - X over pairs, its t interval, P(win)
    verdict(d, equivalence_margin(d, slope))        better, worse, equivalent, inconclusive
    verdicts([d1, d2], [m1, m2])                    the same for several Y against one X, Holm-adjusted
    detectable(sd, n)                               what n pairs can see, before any compute is spent
    interaction(ln_a, ln_b, ln_ab)                  is A + B more than A times B?

A difference is always Y - X. Losses are in nats, or any one unit throughout. Compute-equivalent gain and speed
ratios are in `deltax.lab.gain`, learning-rate strips in `deltax.lab.rates`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from deltax.errors import UserError

SMOKE_PAIRS = 3
LOOKS = {4: 0.010, 8: 0.015, 12: 0.025}
FLIPS_UP_TO = 12


class Better(IntEnum):
    """Which way the metric improves; the value is the sign of an improvement."""

    LOWER = -1
    HIGHER = 1


class Outcome(Enum):
    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    INCONCLUSIVE = "inconclusive"
    NO_VERDICT = "no verdict"


@dataclass(frozen=True)
class Interval:
    """A confidence interval; an end that the data cannot bound is infinite."""

    low: float
    high: float
    level: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"[{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Prior:
    """The pair-to-pair sd that earlier comparisons on this machine saw, and how many degrees of freedom it is worth."""

    sd: float
    df: float

    def __post_init__(self):
        if not (0 < self.sd < math.inf and 0 < self.df < math.inf):
            raise UserError(f"a prior needs a positive, finite sd and df, not {self.sd} and {self.df}")


@dataclass(frozen=True)
class Difference:
    """What n pairs say about Y - X; made by `paired`.

    `sd` is the pair-to-pair sd that the interval used (shrunk towards `prior` where there is one), on `df` degrees
    of freedom. `p` is two-sided: of the t test, or of the sign test when a run diverged (then `interval` is unbounded);
    `divergence_p` is that of the counts of diverged runs alone.
    """

    values: tuple[float, ...]
    sd: float
    df: float
    interval: Interval
    p: float
    better: Better
    prior: Prior | None = None
    evaluation_se: float = 0.0

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """Infinite when one arm diverged, NaN when both did."""
        return _mean(self.values)

    @property
    def diverged(self) -> int:
        """Pairs in which at least one run diverged."""
        return sum(not math.isfinite(v) for v in self.values)

    @property
    def diverged_y(self) -> int:
        """Pairs in which Y diverged."""
        return sum(math.isnan(v) or v == -self.better * math.inf for v in self.values)

    @property
    def diverged_x(self) -> int:
        """Pairs in which X diverged."""
        return sum(math.isnan(v) or v == self.better * math.inf for v in self.values)

    @property
    def divergence_p(self) -> float:
        """Fisher's exact test of how many of n runs of Y and of n runs of X diverged; 1 where none did.

        The sign test of 5 pairs cannot reach 0.05 (2 / 2^5); all of 5 runs against none of 5 is 0.008.
        """
        return fisher(self.diverged_y, self.diverged_x, self.n)

    @property
    def verdict_p(self) -> float:
        """What a verdict goes by: `p`, or where a run diverged the smaller of `p` and `divergence_p`, doubled."""
        return min(1.0, 2 * min(self.p, self.divergence_p)) if self.diverged else self.p

    @property
    def wins(self) -> int:
        return sum(v * self.better > 0 for v in self.values)

    @property
    def losses(self) -> int:
        return sum(v * self.better < 0 for v in self.values)

    @property
    def method(self) -> str:
        if self.diverged:
            return "sign test" if self.p < self.divergence_p else "Fisher's exact test of diverged runs"
        return "paired t" if self.prior is None else "moderated t"

    @property
    def sign_flip_p(self) -> float | None:
        """Exact two-sided sign-flip p; None above 12 pairs or when a run diverged."""
        return None if self.diverged or self.n > FLIPS_UP_TO else sign_flip(self.values)

    @property
    def sign_flip_floor(self) -> float:
        """2 / 2^n, the smallest p that n pairs could give a sign-flip test (section D)."""
        return 2.0 ** (1 - self.n)

    @property
    def p_win(self) -> float:
        """P(Y is better on a new pair, same evaluation set), from the t predictive distribution.

        (D - mean) / (sd sqrt(1 + 1/n)) ~ t(df), so P = F_t(signed mean / (sd sqrt(1 + 1/n))). When a run diverged,
        the share of pairs won, a tie counting half.
        """
        if self.diverged:
            return (self.wins + (self.n - self.wins - self.losses) / 2) / self.n
        spread = self.sd * math.sqrt(1 + 1 / self.n)
        return float(special.stdtr(self.df, _ratio(self.better * self.mean, spread)))

    @property
    def detectable(self) -> float:
        """The smallest true effect that this comparison would have found with 80 % power."""
        if self.diverged:
            return math.inf
        effective = math.sqrt(self.sd**2 + self.n * self.evaluation_se**2)
        return detectable(effective, self.n, level=self.interval.level, df=self.df)


@dataclass(frozen=True)
class Verdict:
    """`detectable` and `margin` are in the units of the difference."""

    outcome: Outcome
    detectable: float
    margin: float

    def __str__(self) -> str:
        match self.outcome:
            case Outcome.INCONCLUSIVE:
                return f"inconclusive (could have seen ≥ {self.detectable:.2g})"
            case Outcome.EQUIVALENT:
                return f"equivalent (within ±{self.margin:.2g})"
            case Outcome.NO_VERDICT:
                return f"no verdict ({SMOKE_PAIRS} pairs or fewer are a smoke test)"
            case outcome:
                return outcome.value


def differences(x_losses: ArrayLike, y_losses: ArrayLike, better: Better = Better.LOWER) -> np.ndarray:
    """Y - X for each pair, (n,). A diverged run (NaN or infinite) is worse than any finite one; both: NaN."""
    x, y = (np.asarray(a, float) for a in (x_losses, y_losses))
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(f"pairs need as many losses of X as of Y, not shapes {x.shape} and {y.shape}")
    x, y = (np.where(np.isfinite(a), a, -better * np.inf) for a in (x, y))
    with np.errstate(invalid="ignore"):
        return y - x


def paired(
    values: ArrayLike,
    level: float = 0.95,
    better: Better = Better.LOWER,
    prior: Prior | None = None,
    evaluation_se: float = 0.0,
) -> Difference:
    """The paired t interval of the mean of Y - X, over n >= 2 pairs (A.1 "Inference").

    With a `prior` the t is moderated: sd^2 = (d0 s0^2 + d s^2) / (d0 + d) on d0 + d degrees of freedom (Smyth 2004,
    Eq. 3). `evaluation_se` (see `evaluation_se`) is an error that all pairs share, so it does not shrink with n: it
    is added to the variance of the mean, as known, with Satterthwaite's degrees of freedom. Divergence is an outcome:
    with any non-finite value the interval is unbounded and p is the sign test's.
    """
    values = tuple(float(v) for v in np.asarray(values, float).ravel())
    n = len(values)
    if n < 2:
        raise UserError(f"an interval needs at least 2 pairs, not {n}")
    if not 0 < level < 1:
        raise UserError(f"a level lies between 0 and 1, not {level}")
    if not 0 <= evaluation_se < math.inf:
        raise UserError(f"an evaluation error is at least 0, not {evaluation_se}")
    if not np.isfinite(values).all():
        unbounded = Interval(-math.inf, math.inf, level)
        return Difference(values, math.nan, n - 1, unbounded, _sign_test(values), better, prior, evaluation_se)
    mean = _mean(values)
    variance, df = moderate(float(np.var(values, ddof=1)), n - 1, prior)
    of_mean = variance / n + evaluation_se**2
    if evaluation_se:
        df = df * (of_mean / (variance / n)) ** 2 if variance else 1e9
    half = t_quantile(level, df) * math.sqrt(of_mean)
    p = float(2 * special.stdtr(df, -abs(_ratio(mean, math.sqrt(of_mean)))))
    interval = Interval(mean - half, mean + half, level)
    return Difference(values, math.sqrt(variance), df, interval, p, better, prior, evaluation_se)


def moderate(variance: float, df: float, prior: Prior | None) -> tuple[float, float]:
    """The variance shrunk towards the prior's, and its degrees of freedom; both as given without a prior."""
    if prior is None:
        return variance, df
    return (prior.df * prior.sd**2 + df * variance) / (prior.df + df), prior.df + df


def ledger_prior(sds: ArrayLike, dfs: ArrayLike) -> Prior:
    """The prior that k >= 2 earlier comparisons at one size and budget imply: moments of log s^2 (Smyth 2004, 6.2).

    Its df never exceeds the ledger's own total.
    """
    sds, dfs = (np.asarray(a, float).ravel() for a in (sds, dfs))
    if len(sds) != len(dfs) or len(sds) < 2 or not ((sds > 0) & (dfs > 0)).all():
        raise UserError("a ledger prior needs at least 2 earlier comparisons, each with a positive sd and df")
    logs = np.log(sds**2) - special.digamma(dfs / 2) + np.log(dfs / 2)
    excess = logs.var(ddof=1) - special.polygamma(1, dfs / 2).mean()
    most, half = dfs.sum(), dfs.sum() / 2
    if excess > special.polygamma(1, half):
        half = optimize.brentq(lambda h: special.polygamma(1, h) - excess, 1e-6, half)
    variance = np.exp(logs.mean() + special.digamma(half) - np.log(half))
    return Prior(float(np.sqrt(variance)), float(min(2 * half, most)))


def evaluation_se(x_losses: ArrayLike, y_losses: ArrayLike, documents: ArrayLike, sizes: ArrayLike) -> float:
    """Standard error of the mean of Y - X from having evaluated on these documents only (A.1 "Pairing").

    Losses are summed over each evaluation sequence, (pairs, sequences); `documents` and `sizes` (bytes) are
    (sequences,). Sequences are differenced first, averaged over pairs, and clustered by document.
    """
    x, y = (np.atleast_2d(np.asarray(a, float)) for a in (x_losses, y_losses))
    documents, sizes = np.asarray(documents), np.asarray(sizes, float)
    if not x.shape == y.shape or not x.shape[1:] == documents.shape == sizes.shape:
        raise UserError("evaluation losses of X and Y, documents and sizes must be of the same sequences")
    names, cluster = np.unique(documents, return_inverse=True)
    if len(names) < 2:
        raise UserError("an evaluation error needs at least 2 held-out documents")
    difference = (y - x).mean(0)
    residual = difference - sizes * difference.sum() / sizes.sum()
    by_document = np.bincount(cluster, residual)
    return float(math.sqrt(len(names) / (len(names) - 1) * (by_document**2).sum()) / sizes.sum())


def sign_flip(values: ArrayLike) -> float:
    """Exact two-sided sign-flip p of the mean, over all 2^n flips, n <= 12 (section D)."""
    values = np.asarray(values, float)
    if len(values) > FLIPS_UP_TO:
        raise UserError(f"the exact sign-flip test takes up to {FLIPS_UP_TO} pairs, not {len(values)}")
    sums = np.abs(_signs(len(values)) @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


def detectable(sd: float, n: int, power: float = 0.8, level: float = 0.95, df: float | None = None) -> float:
    """The smallest effect that a two-sided paired t test on n pairs finds with this power (section D's table).

    Exact, by the noncentral t. `df` is n - 1 unless the sd is known better (pooled or moderated).
    """
    if n < 2 or sd < 0:
        raise UserError(f"an effect is detectable with at least 2 pairs and an sd of at least 0, not {n} and {sd}")
    if not 0 < 1 - level < power < 1:
        raise UserError(f"the power must lie between 1 - level and 1, not {power} at level {level}")
    return sd / math.sqrt(n) * _noncentrality(n - 1 if df is None else df, power, level)


def holm(pvalues: ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given, (k,)."""
    p = np.asarray(pvalues, float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise UserError("Holm's method takes a list of p-values between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def asked_margin(slope: float) -> float:
    """±2 % compute-equivalent gain in nats (A.1 "Verdicts"); `slope` is nats per e-fold of compute, 0 if unknown."""
    return abs(slope) * math.log(1.02)


def equivalence_margin(difference: Difference, slope: float = 0.0) -> float:
    """The margin that is asked for, or what the comparison could detect if that is larger (A.1 "Verdicts")."""
    return max(asked_margin(slope), difference.detectable)


def verdict(difference: Difference, margin: float, adjusted_p: float | None = None) -> Verdict:
    """The verdict on one Y (A.1 "Verdicts"); `adjusted_p` (Holm's) stands in for the interval's exclusion of 0.

    Up to 3 pairs there is none. An arm that diverged is never better, and no interval is claimed for it; one that
    diverged more often than chance allows is worse, whatever its other runs came to.
    """
    if not margin >= 0:
        raise UserError(f"an equivalence margin is at least 0, not {margin}")
    outcome = _outcome(difference, margin, difference.verdict_p if adjusted_p is None else adjusted_p)
    return Verdict(outcome, difference.detectable, margin)


def verdicts(candidates: Sequence[Difference], margins: Sequence[float]) -> list[Verdict]:
    """Verdicts on k candidates against one X, each by its Holm-adjusted p; their raw intervals stay as they are."""
    if len(candidates) != len(margins):
        raise UserError(f"{len(candidates)} candidates need as many margins, not {len(margins)}")
    adjusted = holm([d.verdict_p for d in candidates])
    return [verdict(d, m, p) for d, m, p in zip(candidates, margins, adjusted, strict=True)]


def interaction(ln_a: ArrayLike, ln_b: ArrayLike, ln_ab: ArrayLike, level: float = 0.95) -> Difference:
    """ln CEG(A+B) - ln CEG(A) - ln CEG(B), a paired t on the pairs' own contrasts (A.2.7).

    Positive: together they give more than the product. The four arms share X, so `gain.log_gains` reads every pair off
    one ladder, whose slope is taken as known: it scales the contrast and cannot give it a sign.
    """
    a, b, ab = (np.asarray(v, float) for v in (ln_a, ln_b, ln_ab))
    if not a.shape == b.shape == ab.shape:
        raise UserError(f"an interaction needs the same pairs for A, B and A+B, not {a.shape}, {b.shape}, {ab.shape}")
    if not np.isfinite([a, b, ab]).all():
        raise UserError("a pair's gain lies beyond the ladder: train X at a larger budget, or compare losses instead")
    return paired(ab - a - b, level, Better.HIGHER)


def look_level(n: int) -> float:
    """The confidence level of the look at n pairs under --until-clear: α is split .01, .015, .025 (A.1)."""
    if n not in LOOKS:
        raise UserError(f"--until-clear looks at {', '.join(map(str, LOOKS))} pairs, not at {n}")
    return 1 - LOOKS[n]


def t_quantile(level: float, df: ArrayLike) -> np.ndarray:
    """Two-sided t quantile: P(|t(df)| <= q) = level."""
    return special.stdtrit(df, (1 + level) / 2)


def _outcome(d: Difference, margin: float, p: float) -> Outcome:
    if d.n <= SMOKE_PAIRS:
        return Outcome.NO_VERDICT
    if p <= 1 - d.interval.level:
        if d.diverged and d.divergence_p <= d.p:
            if d.diverged_y > d.diverged_x:
                return Outcome.WORSE
            return Outcome.INCONCLUSIVE if d.diverged_y else Outcome.BETTER
        if d.diverged:
            clean_win = d.wins > d.losses and d.mean == d.better * math.inf
            clean_loss = d.losses > d.wins and d.mean == -d.better * math.inf
            return Outcome.BETTER if clean_win else Outcome.WORSE if clean_loss else Outcome.INCONCLUSIVE
        return Outcome.BETTER if d.mean * d.better > 0 else Outcome.WORSE
    inside = not d.diverged and -margin <= d.interval.low and d.interval.high <= margin
    return Outcome.EQUIVALENT if inside else Outcome.INCONCLUSIVE


@lru_cache(maxsize=256)
def _noncentrality(df: float, power: float, level: float) -> float:
    critical = float(t_quantile(level, df))
    # The square of a noncentral t is a noncentral F, which holds both tails and is stable far out.
    missed = lambda nc: special.ncfdtr(1, df, nc**2, critical**2) - (1 - power)
    far = critical + 1
    while missed(far) > 0:
        far *= 2
    return optimize.brentq(missed, 0, far, xtol=1e-10)


@lru_cache(maxsize=16)
def _signs(n: int) -> np.ndarray:
    return np.array(list(product((1.0, -1.0), repeat=n)))


def fisher(a: int, b: int, n: int) -> float:
    """Fisher's exact two-sided p of a events among n against b among another n."""
    chances = [math.comb(n, k) * math.comb(n, a + b - k) for k in range(max(0, a + b - n), min(n, a + b) + 1)]
    seen = math.comb(n, a) * math.comb(n, b)
    return sum(chance for chance in chances if chance <= seen) / sum(chances)


def _sign_test(values: Sequence[float]) -> float:
    up, down = sum(v > 0 for v in values), sum(v < 0 for v in values)
    return min(1.0, 2 * float(special.bdtr(min(up, down), up + down, 0.5)))


def _mean(values: Sequence[float]) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.mean(values))


def _ratio(value: float, spread: float) -> float:
    if spread == 0:
        return 0.0 if value == 0 else math.copysign(math.inf, value)
    return value / spread
