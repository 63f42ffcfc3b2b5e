"""Attention that looks at a few points of several maps, wherever each query sends them (arXiv:2010.04159)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltax.errors import UserError
from deltax.parts.attention.context import Context, with_pos_embed
from deltax.parts.model.linear import XavierLinear
from deltax.parts.numerics.precision import at_least_float32, in_float32
from deltax.recipe import Part, part
from deltax.shapes import Stream

Grids = tuple[tuple[int, int], ...]  # rows and columns of each map; a stream has them one after the other, row by row


class DeformableAttention(nn.Module):
    """Each cell of several maps reads `points` points of each map in each head, at offsets from where it stands, and
    weighs them (Eq. 3 there). Stream (B, T, D), with `ctx.grids` -> (B, T, D).

    There are no keys: offsets and weights are linear in the query. Points are placed in float32 at least. At the start
    the heads look in as many directions, the points at one cell's distance, two, and so on. Raises UserError for a
    width that is no multiple of the heads.
    """

    def __init__(
        self, dim: int, *, heads: int = 4, levels: int = 3, points: int = 4, value: Part = part(XavierLinear),
        out: Part = part(XavierLinear),
    ):  # fmt: skip
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} is not a multiple of {heads} heads; set heads to a divisor of it")
        self.shape = heads, levels, points
        self.offsets, self.weights = (
            nn.Linear(dim, heads * levels * points * 2),
            nn.Linear(dim, heads * levels * points),
        )
        self.value, self.out = value(dim, dim), out(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        heads, levels, points = self.shape
        for weight in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        way = torch.stack([angle.cos(), angle.sin()], -1)
        way = (way / way.abs().amax(-1, keepdim=True))[:, None, None]
        far = torch.arange(1, points + 1)[:, None].expand(levels, points, 1)
        self.offsets.bias.copy_((way * far).flatten())

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "segments")
        heads, levels, points = self.shape
        asked = with_pos_embed(x, ctx.pos_embed)
        # A place is a share of a map: 8 bits of it miss the cell from 256 cells on
        offsets = at_least_float32(self.offsets(asked)).unflatten(-1, (heads, levels, points, 2))
        weights = self.weights(asked).unflatten(-1, (heads, levels * points)).softmax(-1)
        size = offsets.new_tensor([[columns, rows] for rows, columns in ctx.grids])
        at = centres(ctx.grids, offsets)[:, None, None, None] + offsets / size[:, None]
        values = self.value(x).unflatten(-1, (heads, -1))
        return self.out(read(values, ctx.grids, at, weights.unflatten(-1, (levels, points))).to(values.dtype))


def centres(grids: Grids, like: Tensor) -> Float[Tensor, "S 2"]:
    """(x, y) of the centre of every cell of every map, its map as 1."""
    count = lambda n: (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n
    each = (torch.meshgrid(count(rows), count(columns), indexing="ij") for rows, columns in grids)
    return torch.cat([torch.stack([x, y], -1).flatten(0, 1) for y, x in each])


@in_float32
def read(
    values: Float[Tensor, "B S H K"],
    grids: Grids,
    at: Float[Tensor, "B T H L P 2"],
    weights: Float[Tensor, "B T H L P"],
) -> Float[Tensor, "B T _"]:
    """For each query and head the weighted sum of values at points (x, y) of L maps, each map as 1, bilinearly between
    the centres of cells and zero outside. -> (B, T, H K)."""
    batch, cells, heads, width = values.shape
    cell, share = corners_of(grids, at, weights)
    first = torch.arange(batch, device=at.device)[:, None, None, None] * (cells * heads)
    row = cell * heads + first + torch.arange(heads, device=at.device)[:, None]
    share = share.flatten(0, 2).to(values.dtype)
    out = weighted_rows(values.reshape(-1, width), row.flatten(0, 2), share)
    return out.view(batch, at.shape[1], heads * width)


def corners_of(
    grids: Grids, at: Float[Tensor, "B T H L P 2"], weights: Float[Tensor, "B T H L P"]
) -> tuple[Int[Tensor, "B T H _"], Float[Tensor, "B T H _"]]:
    """The four cells around each point, as they are counted through all maps, and what each is worth."""
    rows, columns = torch.tensor(grids, device=at.device).T[:, :, None]
    start = (rows * columns).cumsum(0) - rows * columns
    point = at * torch.stack([columns, rows], -1) - 0.5
    low = point.detach().floor()
    right, down = (point - low).unbind(-1)
    right_share, left_share = weights * right, weights * (1 - right)
    share = torch.stack(
        [left_share * (1 - down), right_share * (1 - down), left_share * down, right_share * down], -1
    )  # fmt: skip
    x, y = (torch.stack([axis, axis + 1], -1) for axis in low.long().unbind(-1))
    inside_x, inside_y = (x >= 0) & (x < columns[..., None]), (y >= 0) & (y < rows[..., None])
    inside = (inside_y[..., :, None] & inside_x[..., None, :]).flatten(-2)
    cell = ((y * columns[..., None] + start[..., None])[..., :, None] + x[..., None, :]).flatten(-2)
    return torch.where(inside, cell, 0).flatten(3), (share * inside).flatten(3)


def weighted_rows(
    table: Float[Tensor, "S K"], row: Int[Tensor, "N P"], weights: Float[Tensor, "N P"]
) -> Float[Tensor, "N K"]:
    """Sums of rows of a table, each with its weight; differentiable once."""
    summed = nn.functional.embedding_bag(row, table.detach(), mode="sum", per_sample_weights=weights)
    return _OfTable.apply(summed, table, row, weights.detach())


class _OfTable(torch.autograd.Function):
    """`summed` as it is; backward, what the table is owed: the gradient summed by row in the same way, after sorting,
    where scattering takes several times as long."""

    @staticmethod
    def forward(ctx, summed: Tensor, table: Tensor, row: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row, weights)
        ctx.rows = len(table)
        return summed.view_as(summed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[no-untyped-def]
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        row, weights = ctx.saved_tensors
        ordered, order = torch.sort(row.flatten().int())
        starts = torch.searchsorted(ordered, torch.arange(ctx.rows, dtype=torch.int32, device=row.device))
        query, share = order // row.shape[1], weights.flatten()[order]
        of_table = nn.functional.embedding_bag(
            query, gradient.contiguous(), starts, mode="sum", per_sample_weights=share
        )
        return gradient, of_table, None, None
