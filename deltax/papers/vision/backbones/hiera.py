"""Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles. Ryali, Hu, Bolya, Wei, Fan, Huang, Aggarwal,
Chowdhury, Poursaeed, Hoffman, Malik, Li, Feichtenhofer, 2023. arXiv:2306.00989

A ViT with pooled attention, but no convolutions or relative positions: attention is local and MAE trains it.

Early attention stays inside mask units; MAE pre-training replaces the spatial bias of convolutions and relative
positions. A mask unit is the square of patches that becomes one token of the last stage. Masking whole units makes MAE
sparse on a hierarchy too: pooling and local attention never mix a visible unit with a masked one. For the decoder,
every stage's tokens of a unit are mapped to the last stage's width and summed. `vit+q-pooled-attention+hiera`
classifies; `vit+mae+q-pooled-attention+hiera` is pre-trained.

The released models have `OverlappingPatches` (7 x 7 convolutions of stride 4), units of 8 x 8 patches, 60% of them
masked, and global attention in the last two stages except the first block of the third. Queries and shortcut are
max-pooled by 2 x 2; the classifier reads the mean of all tokens, normed after it. The released classifiers pool three
times, but pre-training pools twice, so a unit ends as 2 x 2 tokens, and fuses only the stages up to there. Here both
pool equally often, to one token per unit.
"""

from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.vision.backbones.q_pooled_attention import q_pooled_attention
from deltax.papers.vision.backbones.vit import ViT
from deltax.papers.vision.self_supervised.mae import mae
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import Glorot
from deltax.parts.model.nothing import Nothing
from deltax.parts.model.patches import Grid, LearnedGrid, Mean, Pooled, pair
from deltax.parts.model.stack import Stages
from deltax.shapes import Images, OtherStream, Stream


@paper(
    on=(mae, q_pooled_attention),
    replaces=(mae, q_pooled_attention),
    year=2023,
    arxiv="2306.00989",
    whole="vit+q-pooled-attention",
)
def hiera(recipe: Part, *, local: int = 1) -> Part:
    """Local attention inside mask units in the first `local` stages and in the merges after them."""
    masked = "pixel_decoder" in recipe.slots()
    trunk = recipe["model.trunk"]
    if trunk["stack"].make is not Stages:
        raise UserError(f"{recipe.title} has no stages to keep local; write vit+q-pooled-attention+hiera")
    stages, merges, norm = list(trunk["stack.stages"]), list(trunk["stack.merges"]), trunk["norm"]
    levels = len(merges)
    for i in range(min(local, len(stages))):
        # a unit has 4^(levels - i) elements in stage i
        stages[i] = stages[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
        if i < levels:
            # the pooling block after a local stage is still local
            merges[i] = merges[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
    stack = part(trunk["stack"], stages=tuple(stages), merges=tuple(merges))
    # learned absolute positions only
    recipe = recipe.set(ViT, position=LearnedGrid, stack=stack)
    # under MAE the decoder needs tokens, so stages are fused; the classifier pools instead
    if masked:
        return recipe.set(ViT, stack=part(Fused, inner=stack)).wrap("trunk", InUnits, levels=levels)
    # the norm moves behind the mean
    return recipe.set(ViT, norm=Nothing).fill("pool", NormedMean, norm=norm)


class MaskUnits(nn.Module):
    """`inner` attention within each run of `unit` elements. Stream (B, T, D) -> (B, T', D')."""

    def __init__(self, dim: int, *, inner: Part, unit: int):
        super().__init__()
        self.unit = unit
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        ctx.refuse(self, "state", "segments", "place")
        # (B, T, D) -> (B T / unit, unit, D): a unit is a run of elements in z-order
        units = self.inner(x.unflatten(1, (-1, self.unit)).flatten(0, 1), Context())
        return units.unflatten(0, (len(x), -1)).flatten(1, 2)


class Fused(nn.Module):
    """The last stage's token of each unit plus every earlier stage's, mapped to the same width. (B, T, D) -> (B, U, W).

    `inner` is `Stages` whose merges pool by `stride`, to one token per unit.
    """

    def __init__(self, dim: int, *, inner: Part, stride: int = 4, embed: Part = part(Glorot)):
        super().__init__()
        self.inner = inner(dim)
        self.width = self.inner.width
        levels = len(self.inner.merges)
        self.heads = nn.ModuleList(embed(dim * 2**i * stride ** (levels - i), self.width) for i in range(levels))

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        *views, last = self.inner.each(x, ctx)
        for head, view in zip(self.heads, views, strict=True):
            # stage i has stride^(levels - i) elements per unit; their features are concatenated and mapped to width W
            last = last + head(view.reshape(*last.shape[:2], -1))
        return last


class InUnits(nn.Module):
    """`inner` trunk whose tokens are mask units of 2^levels x 2^levels patches."""

    def __init__(self, channels: int, size: int | Grid, *, inner: Part, levels: int = 1):
        super().__init__()
        self.inner = inner(channels, size)
        self.width, self.prefix = self.inner.width, self.inner.prefix
        self.unit = 4**levels
        rows, columns = self.inner.grid
        self.grid = rows // 2**levels, columns // 2**levels

    def tokens(self, images: Images) -> Tensor:
        """The patches of each unit, (B, U, T / U, D)."""
        return self.inner.tokens(images).unflatten(1, (-1, self.unit))

    def read(self, units: Tensor) -> Stream:
        """The trunk's output for these units, (B, N, W)."""
        return self.inner.read(units.flatten(1, 2))

    def forward(self, images: Images) -> Stream:
        return self.read(self.tokens(images))


class OverlappingPatches(nn.Module):
    """A convolution of `reach` x `reach` pixels and stride `patch`. Images (B, C, Y, X) -> stream (B, T, D)."""

    raster = True

    def __init__(self, channels: int, dim: int, *, patch: int = 4, reach: int = 7):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(channels, dim, reach, stride=patch, padding=reach // 2)

    def grid(self, size: int | Grid) -> Grid:
        rows, columns = pair(size)
        if rows % self.patch or columns % self.patch:
            raise UserError(
                f"an image of {rows} x {columns} pixels is no multiple of the stride {self.patch}; "
                f"set a patch that divides both"
            )
        return rows // self.patch, columns // self.patch

    def forward(self, images: Images) -> Stream:
        return self.conv(images).flatten(2).mT


class NormedMean(Mean):
    """The mean over the stream, then the norm. (B, T, D) -> (B, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__(dim)
        self.norm = norm(dim)

    def forward(self, x: Stream) -> Pooled:
        return self.norm(super().forward(x))
