"""The optimum of a learning-rate strip."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltax.errors import UserError
from deltax.lab.rates import Edge, best_rate, depends_on_rate

GRID = (0.25, 0.5, 1, 2, 4)


@given(st.floats(-1.3, 1.3), st.floats(0.01, 2), st.floats(1, 4), st.permutations(range(5)))
def test_a_parabola_is_found_exactly_in_any_order(centre, curvature, floor, order):
    factors = np.array(GRID)[list(order)]
    losses = floor + curvature * (np.log(factors) - centre) ** 2
    best = best_rate(factors, losses)
    if abs(centre) > 1.5 * math.log(2):
        assert best.at_edge is (Edge.HIGH if centre > 0 else Edge.LOW)
    else:
        assert best.factor == pytest.approx(math.exp(centre), rel=1e-6)
        assert best.loss == pytest.approx(floor, abs=1e-9)
        assert best.at_edge is Edge.NONE


@given(
    st.lists(st.floats(1, 9).map(lambda v: round(v, 3)), min_size=5, max_size=5), st.floats(-5, 5), st.floats(0.5, 9)
)
def test_scale_and_shift_of_the_loss_do_not_move_the_optimum(losses, shift, scale):
    losses = np.array(losses)
    best, other = best_rate(GRID, losses), best_rate(GRID, scale * (losses + round(shift, 3)))
    assert other.at_edge is best.at_edge or np.unique(losses).size < 5
    if np.unique(losses).size == 5:
        assert other.factor == pytest.approx(best.factor, rel=1e-6)


def test_the_pilots_strip():
    best = best_rate(np.array([1, 2, 4, 8, 16]) * 1e-3, [2.975, 2.930, 2.936, 3.000, 3.096])
    assert 2e-3 < best.factor < 4e-3
    assert 2.92 < best.loss < 2.930


@pytest.mark.parametrize(
    ("losses", "edge", "factor"),
    [
        ([2.9, 3.0, 3.1, 3.2, 3.3], Edge.LOW, 0.25),
        ([3.3, 3.2, 3.1, 3.0, 2.9], Edge.HIGH, 4),
        ([3.0, 2.95, 2.9, math.nan, math.inf], Edge.NONE, 1),
        ([math.inf, 2.9, 3.0, 3.1, 3.2], Edge.NONE, 0.5),
        ([2.9, math.nan, math.nan, math.nan, math.nan], Edge.LOW, 0.25),
        ([2.9, 2.9, 2.9, 2.9, 2.9], Edge.NONE, 1),
        ([2.9, 2.9, 3.0, 3.1, 3.2], Edge.NONE, 2**-1.5),
        ([3.1, 2.9, 2.9, 3.1, 3.3], Edge.NONE, 2**-0.5),
        ([math.nan] * 5, Edge.LOW, 0.25),
    ],
)
def test_edges_ties_and_divergence(losses, edge, factor):
    best = best_rate(GRID, losses)
    assert best.at_edge is edge
    assert best.factor == pytest.approx(factor)


def test_a_strip_that_diverged_everywhere_says_so():
    assert best_rate(GRID, [math.nan] * 5).loss == math.inf


def test_the_sign_of_a_difference_can_depend_on_the_rate():
    x = np.array([2.975, 2.930, 2.936, 3.000, 3.096])
    assert depends_on_rate(x, np.add(x, [0.004, 0.003, 0.009, -0.011, 0.042]))
    assert not depends_on_rate(x, np.add(x, [0.004, 0.003, 0.009, 0.0, 0.042]))
    assert depends_on_rate([3.0, 3.0, math.nan], [2.9, math.inf, math.nan])
    assert not depends_on_rate([3.0, math.inf, math.nan], [2.9, 3.0, math.nan])
    assert not depends_on_rate(x, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_rate([1, 2], [3, 3]),
        lambda: best_rate([1, 2, 2], [3, 3, 3]),
        lambda: best_rate([0, 1, 2], [3, 3, 3]),
        lambda: depends_on_rate([1, 2], [1, 2, 3]),
    ],
)
def test_bad_strips_are_refused(call):
    with pytest.raises(UserError):
        call()
