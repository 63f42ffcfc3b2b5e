"""Compute-equivalent gain against closed forms, and its coverage on the pilot's noise (PROTOCOL.md A.2.8, B)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deltax.errors import UserError
from deltax.lab.gain import ComputeLadder, Gain, Position, exactly, gain, log_gains, speed_ratio
from deltax.lab.statistics import Interval, Outcome, Prior, interaction, paired, verdict

SD, BELOW, ABOVE, CORRELATION = 0.0136, -0.26, -0.21, 0.47
BUDGETS = (0.5, 1, 2)


def curve(budget: float) -> float:
    """The pilot's X, nats above its loss at 1."""
    return (BELOW if budget < 1 else ABOVE) * math.log(budget)


def exact_ladder(seeds: int = 3, budgets=BUDGETS, slopes=(BELOW, ABOVE)) -> ComputeLadder:
    row = [slopes[b > 1] * math.log(b) for b in budgets]
    return ComputeLadder(budgets, [[3 + s + v for v in row] for s in range(seeds)])


def sample(mean: float, sd: float, n: int = 8) -> np.ndarray:
    z = np.random.default_rng(0).normal(size=n)
    return mean + sd * (z - z.mean()) / z.std(ddof=1)


def simulate(rng, n: int, seeds: int, *true: float, budgets=BUDGETS) -> tuple[list[np.ndarray], ComputeLadder]:
    """Pair differences of arms worth `true` times the budget, and the ladder of the X that they share.

    Each pair's runs share a part of their noise, so that sd(Y - X) is the pilot's at its correlation.
    """
    run = SD / math.sqrt(2 * (1 - CORRELATION))
    common = run * math.sqrt(CORRELATION) * rng.normal(size=(n, 1))
    losses = common + run * math.sqrt(1 - CORRELATION) * rng.normal(size=(n, len(budgets) + len(true)))
    losses += [curve(b) for b in (*budgets, *true)]
    x = losses[:, budgets.index(1)]
    arms = [losses[:, len(budgets) + i] - x for i in range(len(true))]
    return arms, ComputeLadder(budgets, losses[:seeds, : len(budgets)], tuple(range(seeds)))


def coverage(trials: int, n: int, seeds: int, true: float) -> tuple[float, list[Gain]]:
    rng, gains = np.random.default_rng(0), []
    for _ in range(trials):
        (d,), ladder = simulate(rng, n, seeds, true)
        gains.append(gain(d, ladder))
    return float(np.mean([true in g.interval for g in gains])), gains


def three_sigma(rate: float, trials: int) -> float:
    return 3 * math.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize(("n", "seeds"), [(3, 3), (5, 3), (8, 3)])
def test_x_against_x_reads_one(n, seeds):
    rate, gains = coverage(400, n, seeds, 1.0)
    assert rate >= 0.93
    logs = np.log([g.value for g in gains])
    assert abs(logs.mean()) < 3 * logs.std(ddof=1) / math.sqrt(len(logs))


@pytest.mark.parametrize(("n", "seeds", "true"), [(5, 3, 1.25), (5, 5, 1.25), (8, 8, 0.8)])
def test_a_disguised_budget_is_recovered(n, seeds, true):
    trials = 400
    rate, gains = coverage(trials, n, seeds, true)
    slack = three_sigma(0.95, trials)
    assert rate > 0.95 - slack
    # With a ladder seed for every pair the interval is exact; with fewer it errs on the safe side.
    assert seeds < n or rate < 0.95 + slack
    assert np.mean([1 in g.interval for g in gains]) < 0.1
    assert np.median([g.value for g in gains]) == pytest.approx(true, rel=0.02)


def test_ignoring_the_shared_runs_would_misstate_the_interval():
    rng, trials, theta = np.random.default_rng(0), 400, 1.6
    told, ignored = [], []
    for _ in range(trials):
        (d,), ladder = simulate(rng, 8, 8, theta)
        told.append(theta in gain(d, ladder).interval)
        ignored.append(theta in gain(d, ComputeLadder(ladder.budgets, ladder.losses)).interval)
    assert abs(np.mean(told) - 0.95) < three_sigma(0.95, trials)
    assert np.mean(ignored) > 0.95 + three_sigma(0.95, trials)


def test_identical_runs_read_exactly_one():
    g = gain([0.0] * 5, exact_ladder())
    assert (g.value, g.interval.low, g.interval.high, g.position) == (1, 1, 1, Position.INSIDE)


@pytest.mark.parametrize(
    ("mean", "half", "text"), [(0.0017, 0.0125, "0.99 [0.95, 1.05]"), (-0.0194, 0.0105, "1.10 [1.04, 1.15]")]
)
def test_the_pilots_gains(mean, half, text):
    d = sample(mean, half / stats.t.ppf(0.975, 7) * math.sqrt(8))
    assert str(gain(d, exact_ladder())) == text


@given(st.floats(-0.06, 0.06), st.floats(1e-4, 0.02), st.integers(2, 9))
def test_without_slope_noise_fieller_is_the_t_interval(mean, sd, n):
    d, slope = sample(mean, sd, n), -0.23
    g, t = gain(d, exact_ladder(budgets=(0.125, 0.5, 1, 2, 8), slopes=(slope, slope))), paired(d)
    assert math.log(g.value) == pytest.approx(t.mean / slope, abs=1e-9)
    low, high = math.exp(t.interval.high / slope), math.exp(t.interval.low / slope)
    assert g.interval.low == pytest.approx(low if low > 1 / 8 else 0, abs=1e-9)
    assert g.interval.high == pytest.approx(high if high < 8 else math.inf, abs=1e-9)


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-5, 5), st.randoms())
def test_scale_shift_and_order_do_not_matter(seed, scale, shift, random):
    (d,), ladder = simulate(np.random.default_rng(seed), 5, 3, 1.2)
    order = random.sample(range(5), 5)
    moved = ComputeLadder(BUDGETS, scale * np.array(ladder.losses) + shift, [order.index(i) for i in range(3)])
    a, b = gain(d, ladder), gain(scale * d[order], moved)
    assert a.position is b.position
    assert [b.value, b.interval.low, b.interval.high] == pytest.approx(
        [a.value, a.interval.low, a.interval.high], rel=1e-6, nan_ok=True
    )


@given(st.integers(0, 10**6))
def test_the_gain_excludes_one_exactly_when_the_t_interval_excludes_zero(seed):
    (d,), ladder = simulate(np.random.default_rng(seed), 5, 3, 1.07)
    assert (1 in gain(d, ladder).interval) == (0 in paired(d).interval)


@pytest.mark.parametrize("seed", range(5))
def test_inside_one_interval_it_is_fiellers_quadratic(seed):
    (d,), ladder = simulate(np.random.default_rng(seed), 8, 8, 1.4)
    b = ladder.slopes(1)
    (v_d, c), (_, v_b) = np.cov(d, b) / 8
    t2 = stats.t.ppf(0.975, 7) ** 2
    roots = np.roots([b.mean() ** 2 - t2 * v_b, 2 * (t2 * c - d.mean() * b.mean()), d.mean() ** 2 - t2 * v_d])
    g = gain(d, ladder)
    assert [math.log(g.interval.low), math.log(g.interval.high)] == pytest.approx(sorted(roots), abs=1e-8)
    assert math.log(g.value) == pytest.approx(d.mean() / b.mean())


def test_without_noise_in_the_difference_the_ladders_seeds_set_the_degrees_of_freedom():
    ladder = ComputeLadder((1, 2), [[3.0, 2.86], [3.0, 2.84], [3.0, 2.87]])
    b, t = ladder.slopes(0), stats.t.ppf(0.975, 2)
    error = t * b.std(ddof=1) / math.sqrt(3)
    g = gain([-0.08] * 12, ladder)
    ends = [math.log(g.interval.low), math.log(g.interval.high)]
    assert ends == pytest.approx([-0.08 / (b.mean() - error), -0.08 / (b.mean() + error)])


def test_the_delta_method_agrees_where_the_slope_is_sharp():
    rng, n = np.random.default_rng(4), 6
    d = sample(-0.08, 0.01, n)
    rows = [[0.0, s * math.log(2)] for s in -0.21 + 0.004 * rng.normal(size=n)]
    ladder = ComputeLadder((1, 2), rows)
    b = ladder.slopes(0)
    variance = d.var(ddof=1) / n / b.mean() ** 2 + d.mean() ** 2 * b.var(ddof=1) / n / b.mean() ** 4
    half = stats.t.ppf(0.975, n - 1) * math.sqrt(variance)
    g = gain(d, ladder)
    centre = d.mean() / b.mean()
    ends = [math.log(g.interval.low) - centre, math.log(g.interval.high) - centre]
    assert ends == pytest.approx([-half, half], rel=0.05)


def test_beyond_the_ladder_there_are_only_bounds():
    better = gain(sample(-0.315, SD), exact_ladder())
    assert (better.position, better.interval.low, better.interval.high) == (Position.ABOVE, 2, math.inf)
    assert math.isnan(better.value)
    assert str(better) == "> 2 (beyond the ladder)"
    worse = gain(sample(0.4, SD), exact_ladder())
    assert (worse.position, worse.interval.low, worse.interval.high) == (Position.BELOW, 0, 0.5)
    assert str(worse) == "< 0.5 (beyond the ladder)"
    longer = gain(sample(-0.21 * math.log(3), SD), exact_ladder(budgets=(0.5, 1, 2, 4)))
    assert longer.value == pytest.approx(3)
    assert longer.interval.low > 2.5


def test_an_end_that_would_leave_the_ladder_is_open():
    near = gain(sample(-0.21 * math.log(1.95), SD), exact_ladder())
    assert near.value == pytest.approx(1.95)
    assert 1.7 < near.interval.low < 1.95
    assert near.interval.high == math.inf


def test_a_slope_within_its_noise_gives_no_bound():
    flat = ComputeLadder(BUDGETS, [[3.2, 3.0, 2.9], [3.1, 3.0, 3.05], [3.15, 3.0, 2.8]])
    g = gain(sample(-0.02, SD), flat)
    assert (g.position, g.interval) == (Position.UNRESOLVED, Interval(0, math.inf, 0.95))
    assert "add ladder seeds" in str(g)
    assert gain(sample(0.02, SD), flat).position is Position.INSIDE


def test_a_diverged_pair_has_no_gain():
    g = gain([-0.02, -0.01, math.inf], exact_ladder())
    assert (g.position, g.interval.low, g.interval.high, str(g)) == (Position.DIVERGED, 0, math.inf, "diverged")


def test_a_prior_tightens_three_pairs():
    d = sample(-0.02, SD, 3)
    plain, moderated = gain(d, exact_ladder()), gain(d, exact_ladder(), prior=Prior(SD, 20))
    assert moderated.value == plain.value
    assert moderated.interval.high - moderated.interval.low < 0.6 * (plain.interval.high - plain.interval.low)


def test_units_multiply_and_log_variances_add():
    g = gain(sample(-0.02, SD), exact_ladder(slopes=(-0.21, -0.21)))
    speed = speed_ratio([1.1, 1.2, 1.15, 1.12, 1.3], [1, 1.05, 1.02, 0.98, 1.1])
    both = g.times(speed)
    assert both.value == pytest.approx(g.value * speed.value)
    down = math.log(g.value / g.interval.low), math.log(speed.value / speed.interval.low)
    up = math.log(g.interval.high / g.value), math.log(speed.interval.high / speed.value)
    assert math.log(both.value / both.interval.low) == pytest.approx(math.hypot(*down))
    assert math.log(both.interval.high / both.value) == pytest.approx(math.hypot(*up))
    token = g.times(exactly(0.8))
    assert [token.value, token.interval.low, token.interval.high] == pytest.approx(
        [0.8 * g.value, 0.8 * g.interval.low, 0.8 * g.interval.high]
    )
    bound = gain(sample(-0.315, SD), exact_ladder()).times(exactly(0.8))
    assert (str(bound), bound.interval.low, bound.interval.high) == ("> 1.6 (beyond the ladder)", 1.6, math.inf)


def test_speed_ratio_by_order_statistics_covers():
    rng, trials = np.random.default_rng(0), 1500
    told = [
        speed_ratio(1.2 * np.exp(rng.standard_t(2, 9) / 9), np.exp(rng.standard_t(2, 9) / 9)) for _ in range(trials)
    ]
    assert {r.method for r in told} == {"median, order statistics"}
    assert np.mean([1.2 in r.interval for r in told]) > 0.95 - three_sigma(0.95, trials)


def test_speed_ratio_is_the_median_of_paired_blocks():
    x, y = np.array([2.0, 20.0, 2.2, 2.1, 8.4, 2.0, 2.3]), np.array([1.0, 10.0, 1.0, 1.0, 4.0, 1.0, 1.1])
    r = speed_ratio(x, y)
    assert (r.value, r.interval.low, r.interval.high) == pytest.approx((2.3 / 1.1, 2.0, 2.2))
    few = speed_ratio(x[:4], y[:4])
    assert few.method == "median, t of log ratios"
    peer = stats.ttest_1samp(np.log(x[:4] / y[:4]), 0).confidence_interval()
    assert (few.interval.low, few.interval.high) == pytest.approx(tuple(np.exp(peer)))
    assert speed_ratio(y, x).value == pytest.approx(1 / r.value)


@pytest.mark.parametrize("joint", [1.15 * 1.1, 1.15 * 1.1 * 1.2])
def test_the_interaction_covers(joint):
    trials, rng, covered, seen = 400, np.random.default_rng(0), 0, 0
    truth = math.log(joint / (1.15 * 1.1))
    for _ in range(trials):
        arms, ladder = simulate(rng, 8, 8, 1.15, 1.1, joint, budgets=(0.25, 0.5, 1, 2, 4))
        d = interaction(*(log_gains(arm, ladder) for arm in arms))
        covered += truth in d.interval
        seen += verdict(d, 0.0).outcome in (Outcome.BETTER, Outcome.WORSE)
    assert abs(covered / trials - 0.95) < three_sigma(0.95, trials)
    assert seen / trials < 0.09 if truth == 0 else seen / trials > 0.5


def test_log_gains_read_each_pair_off_the_mean_curve():
    values = log_gains([-0.021, 0.026, -1.0, 1.0, 0.0], exact_ladder())
    assert values == pytest.approx([0.1, -0.1, math.nan, math.nan, 0], nan_ok=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ComputeLadder((0.5, 2), [[3, 2], [3, 2]]),
        lambda: ComputeLadder((1, 0.5), [[3, 2], [3, 2]]),
        lambda: ComputeLadder(BUDGETS, [[3, 2, 1]]),
        lambda: ComputeLadder(BUDGETS, [[3, 2], [3, 2]]),
        lambda: ComputeLadder(BUDGETS, [[3, 2, 1], [3, 2, math.nan]]),
        lambda: ComputeLadder(BUDGETS, [[3, 2, 1], [3, 2, 1]], (0,)),
        lambda: ComputeLadder(BUDGETS, [[3, 2, 1], [3, 2, 1]], (0, 0)),
        lambda: gain([0.1], exact_ladder()),
        lambda: gain([0.1, 0.2], ComputeLadder(BUDGETS, [[3, 2, 1], [3, 2, 1]], (0, 2))),
        lambda: speed_ratio([1, 2], [1]),
        lambda: speed_ratio([1, 0], [1, 1]),
        lambda: exactly(0),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
