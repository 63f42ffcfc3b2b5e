"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.
Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo, 2021. arXiv:2103.14030

A ViT, but attention stays inside small windows that shift by half a window every other block, and patches merge two by
two between stages.

Attention in windows costs as much as there are windows, not as their square. Windows that never move would never meet:
shift them, and each overlaps four of the last. The shift is a cyclic one, so there are as many windows as before; what
the edge of the image brings together in one window does not see each other. Within a window, offsets have learned
biases, so positions need no vectors. Swin-T has stages of 2, 2, 6 and 2 blocks from width 96, heads of width 32 and
windows of 7 x 7, and stochastic depth. A grid that does not fill its windows is padded with zeros, which are seen, as
in the released code.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.contract import needs
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.vit import ViT, mean_pooled, vit
from deltax.parts.attention.context import Context
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import LinearNoBias
from deltax.parts.model.patches import Grid
from deltax.parts.model.stack import Alternating, Stages
from deltax.parts.training.roles import tag
from deltax.shapes import OtherStream, Scores, Stream


class RelativeBias(nn.Module):
    """Adds to each score a learned bias of its head for the offset from key to query in a window (Eq. 4).

    A score part. Positions are row * window + column. table ((2 window - 1)^2, H)
    """

    additive = True

    def __init__(self, heads: int, *, window: int = 7, std: float = 0.02):
        super().__init__()
        self.window, self.std = window, std
        self.table = tag(nn.Parameter(torch.empty((2 * window - 1) ** 2, heads)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def forward(self, scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        offset = lambda a, b: a - b + self.window - 1
        rows, columns = offset(q // self.window, k // self.window), offset(q % self.window, k % self.window)
        return scores + self.table[rows * (2 * self.window - 1) + columns, h]


@needs(context=("grid",))
class Windows(nn.Module):
    """The inner mixer, in windows of `window` x `window` patches that begin `shift` down and right (section 3.2).

    Stream (B, T, D) with ctx.grid -> (B, T, D). The inner mixer is told positions row * window + column, and by
    segments who may see whom. A grid no larger than a window is one window, unshifted.
    """

    def __init__(self, dim: int, *, inner: Part, window: int = 7, shift: int = 0):
        super().__init__()
        if not 0 <= shift < window:
            raise UserError(f"windows of {window} shift by 0 to {window - 1} patches, not {shift}")
        self.window, self.shift = window, shift
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "positions", "segments", "place")
        rows, columns = grid_of(x, ctx)
        side, shift = self.window, self.shift
        if min(rows, columns) <= side:
            side, shift = min(rows, columns), 0
        maps = nn.functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, -columns % side, 0, -rows % side))
        grid = (maps.shape[1], maps.shape[2])
        windows = partition(maps.roll((-shift, -shift), (1, 2)) if shift else maps, side)
        line = torch.arange(side, device=x.device)
        positions = (line[:, None] * self.window + line).flatten()
        segments = regions(grid, side, shift, x.device).repeat(len(x), 1) if shift else None
        windows = self.inner(windows, Context(positions=positions, segments=segments))
        maps = unite(windows, side, grid)
        maps = maps.roll((shift, shift), (1, 2)) if shift else maps
        return maps[:, :rows, :columns].flatten(1, 2)


def partition(maps: Tensor, side: int) -> Tensor:
    """Maps (B, Y, X, D) cut into windows: (B W, side side, D), the windows of an image row by row."""
    cut = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unite(windows: Tensor, side: int, grid: Grid) -> Tensor:
    """The maps (B, Y, X, D) of a grid that `partition` cut into windows."""
    rows, columns = grid
    cut = windows.unflatten(1, (side, side)).unflatten(0, (-1, rows // side, columns // side))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def regions(grid: Grid, side: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Which piece of the image each element of each window is from, once rolled by the shift: (W, side side)."""
    at = lambda n: torch.arange(n, device=device)
    of = lambda n: (at(n) >= n - side).long() + (at(n) >= n - shift).long()
    rows, columns = of(grid[0]), of(grid[1])
    return partition((3 * rows[:, None] + columns)[None, ..., None], side)[..., 0]


def grid_of(x: Stream, ctx: Context) -> Grid:
    """The grid that the stream is on. Raises UserError where there is none, or where it has another size."""
    if ctx.grid is None or ctx.grid[0] * ctx.grid[1] != x.shape[1]:
        raise UserError(
            f"a stream of {x.shape[1]} elements on a grid {ctx.grid} has no rows and columns: leave out what stands "
            f"before or behind the patches, a class token for one"
        )
    return ctx.grid


class PatchMerging(nn.Module):
    """Each 2 x 2 patches side by side, normed, mapped to twice the width. (B, T, D) on a grid -> (B, T / 4, 2 D).

    An odd number of rows or columns is filled up with zeros.
    """

    def __init__(self, dim: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduce = LinearNoBias(4 * dim, 2 * dim)

    def forward(self, x: Stream, ctx: Context) -> tuple[OtherStream, Context]:
        rows, columns = grid_of(x, ctx)
        maps = nn.functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, columns % 2, 0, rows % 2))
        four = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduce(self.norm(four.flatten(1, 2))), replace(ctx, grid=(four.shape[1], four.shape[2]))


@paper(on=vit, year=2021, arxiv="2103.14030")
def swin(recipe: Part, *, window: int = 2, depths: tuple[int, ...] = (2, 2)) -> Part:
    """The last stage is as wide, and has as many heads, as the ViT; each one before it half as much."""
    trunk, stages = recipe["model.trunk"], []
    block = trunk["stack.block"]
    for i, depth in enumerate(depths):
        heads = max(1, block["mixer.heads"] >> (len(depths) - 1 - i))
        local = block.set(Attention, heads=heads, score=part(RelativeBias, window=window))
        blocks = tuple(local.wrap("mixer", Windows, window=window, shift=shift) for shift in (0, window // 2))
        stages.append(part(Alternating, depth=depth, blocks=blocks))
    merges = (part(PatchMerging),) * (len(depths) - 1)
    stack = part(Stages, stages=tuple(stages), merges=merges, entry=LayerNorm)
    recipe = mean_pooled(recipe).fill("position", Identity)
    return recipe.set(ViT, dim=trunk["dim"] >> (len(depths) - 1), stack=stack)
