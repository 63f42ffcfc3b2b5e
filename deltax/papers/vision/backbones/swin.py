"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.
Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo, 2021. arXiv:2103.14030

A ViT, but attention is inside local windows that shift every other block, and patches merge between stages.

The cost of attention in windows grows linearly with their number. Fixed windows would never exchange information; each
shifted window overlaps four of the block before. The shift is cyclic, so the number of windows stays, and a mask
separates patches that were not neighbours in the image. Relative position biases within a window replace position
embeddings. Swin-T has stages of 2, 2, 6 and 2 blocks from width 96, heads of width 32, windows of 7 x 7, and stochastic
depth. A grid that does not fill its windows is padded with zeros, which are attended to, as in the released code.
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
from deltax.parts.model.linear import Matrix
from deltax.parts.model.nothing import Nothing
from deltax.parts.model.patches import Grid
from deltax.parts.model.stack import Alternating, Stages
from deltax.parts.training.roles import tag
from deltax.shapes import OtherStream, Scores, Stream


@needs(context=("grid",))
class Windows(nn.Module):
    """`inner` attention within windows of `window` x `window` patches, shifted by `shift` down and right (section 3.2).

    Stream (B, T, D) with ctx.grid -> (B, T, D). `inner` gets positions row * window + column, and segments as its mask.
    A grid no larger than a window is one unshifted window.
    """

    def __init__(self, dim: int, *, inner: Part, window: int = 7, shift: int = 0):
        super().__init__()
        if not 0 <= shift < window:
            raise UserError(
                f"windows of {window} shift by 0 to {window - 1} patches, not {shift}; set shift in that range"
            )
        self.window, self.shift = window, shift
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "positions", "segments", "place")
        rows, columns = grid_of(x, ctx)
        side, shift = self.window, self.shift
        if min(rows, columns) <= side:
            side, shift = min(rows, columns), 0
        # pads bottom and right
        maps = nn.functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, -columns % side, 0, -rows % side))
        grid = (maps.shape[1], maps.shape[2])
        windows = partition(maps.roll((-shift, -shift), (1, 2)) if shift else maps, side)
        line = torch.arange(side, device=x.device)
        positions = (line[:, None] * self.window + line).flatten()
        # after the roll a border window holds patches from up to four regions; only equal segments attend to each
        # other
        segments = regions(grid, side, shift, x.device).repeat(len(x), 1) if shift else None
        windows = self.inner(windows, Context(positions=positions, segments=segments))  # (B W, side side, D)
        maps = unite(windows, side, grid)
        maps = maps.roll((shift, shift), (1, 2)) if shift else maps
        # without the padding, (B, T, D)
        return maps[:, :rows, :columns].flatten(1, 2)


@paper(on=vit, year=2021, arxiv="2103.14030")
def swin(recipe: Part, *, window: int = 2, depths: tuple[int, ...] = (2, 2)) -> Part:
    """The last stage has the ViT's width and heads, each earlier stage half of the next."""
    trunk, stages = recipe["model.trunk"], []
    block = trunk["stack.block"]
    for i, depth in enumerate(depths):
        heads = max(1, block["mixer.heads"] >> (len(depths) - 1 - i))
        local = block.set(Attention, heads=heads, score=part(RelativeBias, window=window))
        # W-MSA and SW-MSA alternate (Eq. 3)
        blocks = tuple(local.wrap("mixer", Windows, window=window, shift=shift) for shift in (0, window // 2))
        stages.append(part(Alternating, depth=depth, blocks=blocks))
    merges = (part(PatchMerging),) * (len(depths) - 1)
    stack = part(Stages, stages=tuple(stages), merges=merges, entry=LayerNorm)
    recipe = mean_pooled(recipe).fill("position", Nothing)
    return recipe.set(ViT, dim=trunk["dim"] >> (len(depths) - 1), stack=stack)


class RelativeBias(nn.Module):
    """Adds to each score a learned bias per head for the offset from key to query in a window (Eq. 4).

    A score part. Positions are row * window + column. table ((2 window - 1)^2, H).
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


class PatchMerging(nn.Module):
    """2 x 2 neighbours concatenated, normed, mapped to twice the width. (B, T, D) on a grid -> (B, T / 4, 2 D).

    Odd numbers of rows or columns are padded with zeros.
    """

    def __init__(self, dim: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduce = Matrix(4 * dim, 2 * dim)

    def forward(self, x: Stream, ctx: Context) -> tuple[OtherStream, Context]:
        rows, columns = grid_of(x, ctx)
        maps = nn.functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, columns % 2, 0, rows % 2))
        four = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        # (B, Y/2, X/2, 4 D) -> (B, T / 4, 2 D)
        return self.reduce(self.norm(four.flatten(1, 2))), replace(ctx, grid=(four.shape[1], four.shape[2]))


def partition(maps: Tensor, side: int) -> Tensor:
    """Maps (B, Y, X, D) cut into windows: (B W, side side, D), an image's windows in row-major order."""
    cut = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    # (B, Y/w, w, X/w, w, D) -> (B W, w w, D)
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unite(windows: Tensor, side: int, grid: Grid) -> Tensor:
    """The inverse of `partition`: windows -> maps (B, Y, X, D) of a grid."""
    rows, columns = grid
    cut = windows.unflatten(1, (side, side)).unflatten(0, (-1, rows // side, columns // side))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def regions(grid: Grid, side: int, shift: int, device: torch.device | None = None) -> Tensor:
    """The image region (0 to 8) of each element of each window after the cyclic shift: (W, side side)."""
    at = lambda n: torch.arange(n, device=device)
    # 0, 1 or 2: before the last window, in it, and rolled over from the other side
    of = lambda n: (at(n) >= n - side).long() + (at(n) >= n - shift).long()
    rows, columns = of(grid[0]), of(grid[1])
    return partition((3 * rows[:, None] + columns)[None, ..., None], side)[..., 0]


def grid_of(x: Stream, ctx: Context) -> Grid:
    """The stream's grid. Raises UserError where there is none, or one of another size."""
    if ctx.grid is None or ctx.grid[0] * ctx.grid[1] != x.shape[1]:
        raise UserError(
            f"a stream of {x.shape[1]} elements on a grid {ctx.grid} has no rows and columns: leave out tokens "
            f"before or behind the patches, a class token for one"
        )
    return ctx.grid
