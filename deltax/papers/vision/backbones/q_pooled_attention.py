"""Multiscale Vision Transformers. Fan, Xiong, Mangalam, Li, Yan, Malik, Feichtenhofer, 2021. arXiv:2104.11227

Attention, but the queries are pooled, so what leaves is shorter than what entered.

Each group of patches asks one question and sees every patch: attention itself makes the map smaller, and its cost falls
with the stride. At such a block the stream becomes twice as wide too. MViT pools with convolutions; this is the pooling
that Hiera came to (arXiv:2306.00989), the largest of each group. Groups are neighbours in the stream: patches go in
z-order, where four that follow each other are a square, and again four such squares.
"""

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.contract import needs
from deltax.papers.language.attention.softmax_attention import Attention, Projections
from deltax.papers.vision.backbones.vit import ViT, mean_pooled, vit
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import Linear, OutProj, XavierLinear
from deltax.parts.model.patches import Grid, Patches
from deltax.parts.model.stack import Stack, Stages
from deltax.shapes import Images, Keys, Memory, OtherStream, Stream, Values


def pool(x: Tensor, stride: int) -> Tensor:
    """The largest of each `stride` neighbours: (B, T, ...) -> (B, T / stride, ...). Raises UserError for a rest."""
    if x.shape[1] % stride:
        raise UserError(f"{x.shape[1]} elements do not fall into groups of {stride}; set a patch size so that they do")
    return x.unflatten(1, (-1, stride)).amax(2)


@cache
def z_order(grid: Grid, levels: int) -> tuple[int, ...]:
    """The patches of a grid, by their number row by row, in z-order inside units of 2^levels x 2^levels.

    Units go row by row. Raises UserError where they do not fill the grid.
    """
    side = 2**levels
    if grid[0] % side or grid[1] % side:
        raise UserError(f"a grid of {grid[0]} x {grid[1]} patches is not made of units of {side} x {side}")
    order = torch.arange(grid[0] * grid[1]).unflatten(0, grid)[None]
    while side > 1:  # cut into fours, the inner squares of each to the back
        order = order.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)
        side //= 2
    return tuple(order.flatten().tolist())


class ZOrdered(nn.Module):
    """The inner patches in z-order. Images (B, C, Y, X) -> stream (B, T, D)."""

    can_be_zero = ("levels",)
    raster = False
    hides_context = ("grid",)

    def __init__(self, channels: int, dim: int, *, inner: Part = part(Patches), levels: int = 1):
        super().__init__()
        self.inner, self.levels = inner(channels, dim), levels

    def grid(self, size: int | Grid) -> Grid:
        grid = self.inner.grid(size)
        z_order(grid, self.levels)  # a grid that units do not fill fails here, not in the middle of a run
        return grid

    def forward(self, images: Images) -> Stream:
        rows, columns = images.shape[-2:]
        return self.inner(images)[:, list(z_order(self.grid((rows, columns)), self.levels))]


def widened(dim: int, out: int, *, made: Part, before: int = 1, after: int = 1) -> nn.Module:
    """A map from `before` times the width to `after` times that."""
    return made(before * dim, after * out)


@needs(beside={"qk_position": ("Identity",)})
class QPooled(Projections):
    """Projections to `widen` times the width, the queries pooled by `stride`.

    Stream (B, T, D) -> q (B, T / stride, H, K), k and v (B, T, H, K); heads -> (B, T / stride, widen D).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        stride: int = 4,
        widen: int = 1,
        query: Part = part(Linear),
        key: Part = part(Linear),
        value: Part = part(Linear),
        out: Part = part(OutProj),
    ):
        wide = lambda made: part(widened, made=made, after=widen)
        both = part(widened, made=out, before=widen, after=widen)
        super().__init__(dim, heads, query=wide(query), key=wide(key), value=wide(value), out=both)
        self.stride = stride

    def split(
        self, x: Stream, memory: Memory | None = None, values: Memory | None = None
    ) -> tuple[Float[Tensor, "B _ H K"], Keys, Values]:
        q, k, v = super().split(x, memory, values)
        return pool(q, self.stride), k, v


@needs(inside=("QPooled",))
class PooledBlock(nn.Module):
    """pool(shortcut(norm(x))) + mixer(norm(x)), whose mixer pools and widens alike; then the MLP's branch.

    Stream (B, T, D) -> (B, T / stride, widen D), and the context, whose grid it leaves.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: Part,
        mixer: Part,
        residual: Part,
        mlp: Part,
        shortcut: Part = part(XavierLinear),
        stride: int = 4,
        widen: int = 2,
    ):
        super().__init__()
        self.stride = stride
        self.norm, self.shortcut = norm(dim), shortcut(dim, widen * dim)
        self.mixer = mixer(dim)
        self.mlp_residual, self.mlp = residual(widen * dim), mlp(widen * dim)

    def forward(self, x: Stream, ctx: Context) -> tuple[OtherStream, Context]:
        ctx.refuse(self, "state", "segments")
        ctx = replace(ctx, grid=None)
        x = self.norm(x)
        return self.mlp_residual(pool(self.shortcut(x), self.stride) + self.mixer(x, ctx), self.mlp), ctx


@paper(on=vit, year=2021, arxiv="2104.11227")
def q_pooled_attention(recipe: Part, *, depths: tuple[int, ...] = (2, 2)) -> Part:
    """Stages of these many blocks, the first of each but the first stage a pooled one. The last stage is as wide, and
    has as many heads, as the ViT; each one before it half as much."""
    trunk, levels = recipe["model.trunk"], len(depths) - 1
    block, norm, stages, merges = trunk["stack.block"], trunk["norm"], [], []
    for i, depth in enumerate(depths):
        local = block.set(Attention, heads=max(1, block["mixer.heads"] >> (levels - i)))
        stages.append(part(Stack, depth=depth - (i > 0), block=local))
        if i > 0:
            kept = {k: v for k, v in local["mixer.project"].kwargs}
            mixer = local["mixer"].set(Attention, project=part(QPooled, **kept, widen=2))
            merges.append(part(PooledBlock, norm=norm, mixer=mixer, residual=local["residual"], mlp=local["mlp"]))
    return mean_pooled(recipe).set(
        ViT,
        dim=trunk["dim"] >> levels,
        patches=part(ZOrdered, inner=trunk["patches"], levels=levels),
        stack=part(Stages, stages=tuple(stages), merges=tuple(merges)),
    )
