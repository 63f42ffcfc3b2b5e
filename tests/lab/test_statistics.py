"""Properties of the interval, the verdict and their companions, and simulations of their coverage."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from deltax.errors import UserError
from deltax.lab.statistics import (
    LOOKS,
    Better,
    Difference,
    Outcome,
    Prior,
    detectable,
    differences,
    equivalence_margin,
    evaluation_se,
    fisher,
    holm,
    interaction,
    ledger_prior,
    look_level,
    paired,
    sign_flip,
    verdict,
    verdicts,
)

SD = 0.0136
pairs = st.lists(st.floats(-1, 1).map(lambda v: round(v, 4)), min_size=4, max_size=9)


def sample(mean: float, sd: float, n: int = 8, seed: int = 0) -> np.ndarray:
    """n values with exactly this mean and sd."""
    z = np.random.default_rng(seed).normal(size=n)
    return mean + sd * (z - z.mean()) / z.std(ddof=1)


def three_sigma(rate: float, trials: int) -> float:
    return 3 * math.sqrt(rate * (1 - rate) / trials)


def test_paired_is_scipys_t_test():
    values = np.array([0.031, -0.012, 0.054, 0.008, 0.02])
    d, peer = paired(values, level=0.9), stats.ttest_1samp(values, 0)
    assert d.p == pytest.approx(peer.pvalue, rel=1e-12)
    assert (d.interval.low, d.interval.high) == pytest.approx(tuple(peer.confidence_interval(0.9)), rel=1e-12)
    assert d.p_win == pytest.approx(stats.t.cdf(-d.mean / (d.sd * math.sqrt(1 + 1 / 5)), 4), rel=1e-12)
    assert (d.mean, d.sd, d.n, d.df) == pytest.approx((values.mean(), values.std(ddof=1), 5, 4))


@given(pairs, st.floats(0.01, 100), st.randoms())
def test_paired_scales_and_ignores_order(values, scale, random):
    assume(np.std(values) > 1e-3)
    d = paired(values)
    shuffled = random.sample(values, len(values))
    other = paired([scale * v for v in shuffled])
    assert [other.mean, other.sd, other.interval.low, other.interval.high] == pytest.approx(
        [scale * v for v in (d.mean, d.sd, d.interval.low, d.interval.high)], rel=1e-9, abs=1e-12 * scale
    )
    assert [other.p, other.p_win, other.sign_flip_p] == pytest.approx([d.p, d.p_win, d.sign_flip_p], abs=1e-9)


@given(pairs, st.floats(-1, 1))
def test_paired_shifts(values, shift):
    assume(np.std(values) > 1e-3)
    d, other = paired(values), paired(np.add(values, shift))
    assert [other.sd, other.interval.low, other.interval.high] == pytest.approx(
        [d.sd, d.interval.low + shift, d.interval.high + shift], abs=1e-9
    )


@given(pairs)
def test_swapping_the_arms_swaps_everything(values):
    assume(np.std(values) > 1e-3)
    d, swapped = paired(values), paired(np.negative(values))
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-d.interval.high, -d.interval.low))
    assert swapped.p_win == pytest.approx(1 - d.p_win)
    higher = paired(values, better=Better.HIGHER)
    assert (higher.p_win, higher.wins) == pytest.approx((1 - d.p_win, d.losses))


@pytest.mark.parametrize("n", [3, 5, 8, 12])
def test_the_t_interval_covers(n):
    trials = 2000
    draws = np.random.default_rng(n).normal(-0.02, SD, (trials, n))
    covered = np.mean([-0.02 in paired(row).interval for row in draws])
    assert abs(covered - 0.95) < three_sigma(0.95, trials)


def test_p_win_predicts_the_next_pair():
    rng, trials = np.random.default_rng(1), 4000
    # Averaged over data and a flat prior on the mean, the predictive probability is calibrated.
    means = rng.uniform(-5, 5, trials)
    data = rng.normal(means[:, None], 1, (trials, 6))
    told = np.array([paired(row[:5]).p_win for row in data])
    won = data[:, 5] < 0
    for low, high in ((0.05, 0.35), (0.35, 0.65), (0.65, 0.95)):
        inside = (told > low) & (told < high)
        assert abs(won[inside].mean() - told[inside].mean()) < three_sigma(0.5, inside.sum())


def test_sign_flip_is_exact():
    assert sign_flip([1, 2, 3]) == 2 / 8
    assert sign_flip([1, 2, -0.5]) == 4 / 8
    assert sign_flip([1, -1]) == 1
    values = sample(-0.01, SD, 9)
    peer = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(values) == pytest.approx(peer.pvalue, abs=1e-12)
    assert paired(sample(1, 1, 13)).sign_flip_p is None


@pytest.mark.parametrize(("n", "floor"), [(3, 0.25), (5, 0.062), (8, 0.008), (12, 0.0005)])
def test_the_sign_flip_floor_is_reached_by_one_sided_pairs(n, floor):
    d = paired(np.linspace(1, 2, n))
    assert d.sign_flip_floor == d.sign_flip_p
    assert d.sign_flip_floor == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize(
    ("n", "effect", "half", "pooled"),
    [(3, 3.26, 2.48, 1.69), (5, 1.68, 1.24, 1.31), (8, 1.16, 0.84, 1.03), (12, 0.89, 0.64, 0.83)],
)
def test_the_protocols_table(n, effect, half, pooled):
    assert detectable(1, n) == pytest.approx(effect, abs=0.005)
    assert detectable(1, n, df=n - 1 + 20) == pytest.approx(pooled, abs=0.006)
    assert paired(sample(0, 1, n)).interval.half_width == pytest.approx(half, abs=0.005)


@pytest.mark.parametrize(("n", "power", "level"), [(3, 0.8, 0.95), (8, 0.9, 0.99), (4, 0.6, 0.5), (2, 0.95, 0.99)])
def test_a_detectable_effect_is_found_at_its_power(n, power, level):
    trials = 20000
    effect = detectable(2.0, n, power, level)
    draws = np.random.default_rng(0).normal(effect, 2.0, (trials, n))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)
    found = np.mean(np.abs(t) > stats.t.ppf((1 + level) / 2, n - 1))
    assert abs(found - power) < three_sigma(power, trials)


def test_moderation_shrinks_and_says_so():
    values, prior = sample(0.01, 0.03, 3), Prior(SD, 10)
    plain, d = paired(values), paired(values, prior=prior)
    assert d.sd == pytest.approx(math.sqrt((10 * SD**2 + 2 * 0.03**2) / 12))
    assert (d.df, d.method, plain.method) == (12, "moderated t", "paired t")
    assert d.interval.half_width == pytest.approx(stats.t.ppf(0.975, 12) * d.sd / math.sqrt(3))
    weak = paired(values, prior=Prior(SD, 1e-9))
    assert weak.interval.half_width == pytest.approx(plain.interval.half_width, rel=1e-6)


def test_a_moderated_t_covers_when_sds_follow_the_prior():
    trials, n, d0 = 4000, 3, 8
    rng = np.random.default_rng(3)
    sds = SD * np.sqrt(d0 / rng.chisquare(d0, trials))
    draws = rng.normal(0, sds[:, None], (trials, n))
    half = np.array([paired(row, prior=Prior(SD, d0)).interval for row in draws])
    assert abs(np.mean([0 in i for i in half]) - 0.95) < three_sigma(0.95, trials)


def test_the_ledger_gives_back_its_prior():
    rng, d0 = np.random.default_rng(0), 12
    dfs = rng.integers(2, 12, 4000)
    sds = SD * np.sqrt(d0 / rng.chisquare(d0, dfs.size)) * np.sqrt(rng.chisquare(dfs) / dfs)
    prior = ledger_prior(sds, dfs)
    assert prior.sd == pytest.approx(SD, rel=0.03)
    assert prior.df == pytest.approx(d0, rel=0.15)
    equal = ledger_prior([SD, SD, SD], [4, 4, 7])
    assert equal.df == 15


def test_evaluation_error_is_shared_by_all_pairs():
    values = sample(0.01, SD, 5)
    d = paired(values, evaluation_se=0.01)
    assert d.interval.half_width > stats.norm.ppf(0.975) * math.sqrt(SD**2 / 5 + 0.01**2)
    assert d.interval.half_width < stats.t.ppf(0.975, 4) * math.sqrt(SD**2 / 5 + 0.01**2)
    assert paired(values, evaluation_se=1e-9).interval.half_width == pytest.approx(paired(values).interval.half_width)


def test_evaluation_errors_are_clustered_by_document():
    rng = np.random.default_rng(0)
    of_document = rng.normal(size=40)
    x = np.zeros((3, 200))
    y = x + np.repeat(of_document, 5)
    documents, sizes = np.repeat(np.arange(40), 5), np.ones(200)
    assert evaluation_se(x, y, documents, sizes) == pytest.approx(of_document.std(ddof=1) / math.sqrt(40))
    naive = evaluation_se(x, y, np.arange(200), sizes)
    assert naive < 0.5 * evaluation_se(x, y, documents, sizes)


def test_evaluation_error_is_per_byte():
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 500, 30)
    x, y = np.zeros((2, 30)), np.tile(sizes * 0.7, (2, 1))
    assert evaluation_se(x, y, np.arange(30), sizes) == pytest.approx(0, abs=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]).tolist() == [1, 1]
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(p):
    adjusted, p = holm(p), np.array(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, len(p) * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == min(1, len(p) * p.min())


def test_holm_holds_the_family_error():
    trials = 1500
    draws = np.random.default_rng(5).normal(0, SD, (trials, 4, 5))
    wrong = 0
    for family in draws:
        told = verdicts([paired(row) for row in family], [0.0] * 4)
        wrong += any(v.outcome in (Outcome.BETTER, Outcome.WORSE) for v in told)
    assert wrong / trials < 0.05 + three_sigma(0.05, trials)


@pytest.mark.parametrize(
    ("mean", "better", "outcome"),
    [
        (-0.02, Better.LOWER, Outcome.BETTER),
        (0.02, Better.LOWER, Outcome.WORSE),
        (0.02, Better.HIGHER, Outcome.BETTER),
        (0.005, Better.LOWER, Outcome.INCONCLUSIVE),
        (0.001, Better.LOWER, Outcome.EQUIVALENT),
    ],
)
def test_verdicts(mean, better, outcome):
    assert verdict(paired(sample(mean, SD), better=better), margin=0.0135).outcome is outcome


def test_a_verdict_says_what_it_could_have_seen():
    d = paired(sample(0.001, SD))
    told = verdict(d, margin=0.004)
    assert told.detectable == pytest.approx(detectable(SD, 8))
    assert str(told) == "inconclusive (could have seen ≥ 0.016)"
    assert equivalence_margin(d) == told.detectable
    assert equivalence_margin(paired(sample(0, 1e-4)), slope=-0.21) == pytest.approx(0.21 * math.log(1.02))


def test_adjustment_can_take_a_verdict_back():
    d = paired(sample(-0.0125, SD))
    assert 0.025 < d.p < 0.05
    noise = paired(sample(0, SD))
    assert [v.outcome for v in verdicts([d, noise], [0.001, 0.001])] == [Outcome.INCONCLUSIVE] * 2
    assert verdict(d, 0.001).outcome is Outcome.BETTER


def test_three_pairs_are_a_smoke_test():
    assert verdict(paired(sample(-1, 0.001, 3)), 0.01).outcome is Outcome.NO_VERDICT


def test_identical_runs_are_equivalent():
    d = paired([0.0] * 5)
    assert (d.p, d.p_win, d.interval.low, d.interval.high, d.detectable) == (1, 0.5, 0, 0, 0)
    assert verdict(d, 0.001).outcome is Outcome.EQUIVALENT


def test_divergence_is_an_outcome():
    x = [3.0] * 8
    y = [2.9] * 8
    once = paired(differences(x, [*y[:7], math.nan]))
    assert (once.diverged, once.wins, once.losses, once.mean) == (1, 7, 1, math.inf)
    assert once.interval.low == -math.inf
    assert once.p_win == 7 / 8
    assert verdict(once, 0.1).outcome is Outcome.INCONCLUSIVE
    all_of_y = paired(differences(x, [math.inf] * 8))
    assert (all_of_y.p, all_of_y.method) == (2 / 2**8, "Fisher's exact test of diverged runs")
    assert verdict(all_of_y, 0.1).outcome is Outcome.WORSE
    assert verdict(paired(differences([math.nan] * 8, y)), 0.1).outcome is Outcome.BETTER
    both = paired(differences([math.nan, 3, 3, 3], [math.nan, 2.9, 2.9, 2.9]))
    assert (both.diverged, both.wins, both.losses, both.p_win) == (1, 3, 0, 3.5 / 4)
    assert verdict(both, 0.1).outcome is Outcome.INCONCLUSIVE
    assert paired(differences([0.9] * 8, [math.nan] * 8, Better.HIGHER), better=Better.HIGHER).losses == 8


def test_divergence_is_judged_by_itself():
    """The sign test of five pairs cannot reach 0.05; that one recipe diverges each time and the other never is seen."""
    x = [3.0, 3.1, 3.2, 3.3, 3.4]
    always = paired(differences(x, [math.nan] * 5))
    assert always.p == 2 / 2**5 > 0.05 > 2 * always.divergence_p
    assert verdict(always, 0.1).outcome is Outcome.WORSE
    assert verdict(paired(differences([math.nan] * 5, x)), 0.1).outcome is Outcome.BETTER
    assert next(v.outcome for v in verdicts([always, paired(differences(x, x))], [0.1, 0.1])) is Outcome.WORSE
    for y in ([*x[:4], math.nan], [*x[:2], *[math.nan] * 3]):
        assert verdict(paired(differences(x, y)), 0.1).outcome is Outcome.INCONCLUSIVE
    both = paired(differences([math.nan] * 5, [math.nan] * 5))
    assert both.divergence_p == 1 and verdict(both, 0.1).outcome is Outcome.INCONCLUSIVE
    often = paired(differences([3.0] * 12, [*[2.9] * 6, *[math.nan] * 6]))
    assert (often.wins, often.losses, often.p) == (6, 6, 1.0)
    assert verdict(often, 0.1).outcome is Outcome.WORSE
    assert verdict(paired(differences(x[:3], [math.nan] * 3)), 0.1).outcome is Outcome.NO_VERDICT


def test_fishers_test_is_scipys():
    for n in (1, 4, 7):
        for a in range(n + 1):
            for b in range(n + 1):
                theirs = stats.fisher_exact([[a, n - a], [b, n - b]]).pvalue
                assert fisher(a, b, n) == pytest.approx(theirs, rel=1e-9)


def test_eleven_wins_and_a_divergence_are_not_better():
    d = paired(differences([3.0] * 12, [*[2.9] * 11, math.nan]))
    assert d.p < 0.05
    assert verdict(d, 0.1).outcome is Outcome.INCONCLUSIVE


def test_interaction_is_the_contrast():
    a, b, ab = sample(0.1, 0.02, 8, 1), sample(0.2, 0.03, 8, 2), sample(0.35, 0.04, 8, 3)
    d = interaction(a, b, ab)
    assert isinstance(d, Difference)
    assert d.values == pytest.approx(ab - a - b)
    assert d.mean == pytest.approx(0.05)
    assert d.better is Better.HIGHER
    with pytest.raises(UserError, match="larger budget"):
        interaction(a, b, [*ab[:-1], math.nan])


def test_looks_spend_five_percent():
    assert sum(LOOKS.values()) == pytest.approx(0.05)
    assert [look_level(n) for n in (4, 8, 12)] == pytest.approx([0.99, 0.985, 0.975])
    with pytest.raises(UserError, match="4, 8, 12"):
        look_level(6)


def test_looking_three_times_keeps_the_error():
    trials = 2000
    draws = np.random.default_rng(7).normal(0, SD, (trials, 12))
    wrong = sum(any(paired(row[:n], look_level(n)).p <= LOOKS[n] for n in LOOKS) for row in draws)
    assert 0.02 < wrong / trials < 0.05 + three_sigma(0.05, trials)


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired([0.1]),
        lambda: paired([0.1, 0.2], level=95),
        lambda: paired([0.1, 0.2], evaluation_se=-1),
        lambda: differences([1, 2], [1, 2, 3]),
        lambda: Prior(0, 3),
        lambda: ledger_prior([0.1], [4]),
        lambda: detectable(1, 1),
        lambda: detectable(1, 5, power=0.01),
        lambda: holm([0.5, 1.2]),
        lambda: holm([0.5, math.nan]),
        lambda: verdict(paired([0.1, 0.2]), -1),
        lambda: verdicts([paired([0.1, 0.2])], []),
        lambda: sign_flip([0.1] * 13),
        lambda: interaction([1, 2], [1, 2], [1, 2, 3]),
        lambda: evaluation_se([[1.0, 2.0]], [[1.0, 2.0]], ["a", "a"], [1, 1]),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_divergence_is_within_no_margin():
    d = paired(differences([3.0] * 5, [*[2.9] * 4, math.nan]))
    assert verdict(d, equivalence_margin(d)).outcome is Outcome.INCONCLUSIVE
