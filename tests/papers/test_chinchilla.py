"""Runs that no law can be fitted to, and profiles that have no bottom."""

import numpy as np
import pytest

from deltax import UserError
from deltax.papers.scaling.chinchilla import REFITTED, fit, isoflop


def test_too_few_runs_and_diverged_runs_are_refused():
    with pytest.raises(UserError, match="six runs"):
        fit([1e6] * 5, [1e9] * 5, [3.0] * 5)
    with pytest.raises(UserError, match="leave out runs that diverged"):
        fit([1e6] * 6, [1e9] * 6, [3.0] * 5 + [np.inf])


def test_the_fit_does_not_depend_on_the_order_of_runs():
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7, 10, 40), 10 ** rng.uniform(9, 12, 40)
    l = REFITTED.loss(n, d) * np.exp(0.005 * rng.standard_normal(40))
    order = rng.permutation(40)
    a, b = fit(n, d, l), fit(n[order], d[order], l[order])
    np.testing.assert_allclose([*vars(a).values()], [*vars(b).values()], rtol=1e-3)


def test_a_profile_that_opens_downwards_has_no_bottom():
    budgets, sizes = np.repeat([1e18, 1e19], 4), np.tile([1e6, 2e6, 4e6, 8e6], 2)
    found = isoflop(budgets, sizes, -(np.log(sizes / 3e6) ** 2))
    assert not found.interior and np.isnan(found.optima).all() and np.isnan(found.exponent)


@pytest.mark.parametrize(("budgets", "sizes"), [(1, 8), (2, 2), (2, 3)])
def test_an_interval_needs_runs_to_spare(budgets, sizes):
    flops = np.repeat(10.0 ** np.arange(18, 18 + budgets), sizes)
    with pytest.raises(UserError, match="one run to spare"):
        isoflop(flops, np.tile(10.0 ** np.arange(6, 6 + sizes), budgets), np.ones(budgets * sizes))
