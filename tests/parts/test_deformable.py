"""Multi-scale deformable attention: gradients, what lies outside, where it starts, and what it cannot be."""

import pytest
import torch

from deltax.parts.attention.context import Context
from deltax.parts.attention.deformable import DeformableAttention, centres, read, weighted_rows

GRIDS = ((2, 3), (5, 4), (7, 9))


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    table, weights = torch.randn(7, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    row = torch.randint(0, 5, (8, 4))  # rows 5 and 6 are read by nobody
    assert torch.autograd.gradcheck(
        lambda t, w: weighted_rows(t, row, w), (table.requires_grad_(), weights.requires_grad_())
    )


def test_cells_centres_read_the_cells_and_outside_reads_nothing():
    torch.manual_seed(0)
    cells = sum(rows * columns for rows, columns in GRIDS)
    values, at = torch.randn(2, cells, 3, 5), centres(GRIDS, torch.zeros(0))
    for level, (rows, columns) in enumerate(GRIDS):
        start = sum(a * b for a, b in GRIDS[:level])
        mine = slice(start, start + rows * columns)
        points = at[mine].view(1, -1, 1, 1, 1, 2).expand(2, -1, 3, 3, 1, 2)
        only = torch.zeros(2, rows * columns, 3, 3, 1)
        only[:, :, :, level] = 1
        torch.testing.assert_close(read(values, GRIDS, points, only), values[:, mine].flatten(2))
        assert (read(values, GRIDS, points + 2, only) == 0).all() and (read(values, GRIDS, points - 9, only) == 0).all()


def test_at_the_start_heads_look_in_all_directions_with_equal_weight():
    torch.manual_seed(0)
    attention = DeformableAttention(12, heads=4, points=2).double()
    offsets = attention.offsets(torch.randn(12, dtype=torch.float64)).view(4, 3, 2, 2)
    around = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    torch.testing.assert_close(offsets[:, 1, 0], around, atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 2, 1], 2 * around, atol=1e-6, rtol=0)
    assert (attention.weights(torch.randn(12, dtype=torch.float64)) == 0).all()
    x = torch.randn(2, 89, 12, dtype=torch.float64)
    assert attention(x, Context(grids=GRIDS)).shape == x.shape


def test_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="12 is not a multiple of 5 heads"):
        DeformableAttention(12, heads=5)
