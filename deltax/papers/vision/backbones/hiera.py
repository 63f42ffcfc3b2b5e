"""Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles. Ryali, Hu, Bolya, Wei, Fan, Huang, Aggarwal,
Chowdhury, Poursaeed, Hoffman, Malik, Li, Feichtenhofer, 2023. arXiv:2306.00989

A ViT with pooled attention, but nothing else: early attention stays inside mask units, and what convolutions and
relative positions used to bring is left to MAE to teach.

A mask unit is what one token of the last stage has come from, a square of patches. Masking whole units makes MAE sparse
on a pyramid too: no pooling and no local attention ever mixes a unit that is seen with one that is not. For the
decoder, every stage's view of a unit is mapped to the last stage's width, and summed. `vit+q-pooled-attention+hiera`
classifies; `vit+mae+q-pooled-attention+hiera` is pre-trained. The released models embed patches by 7 x 7 convolutions
of stride 4, fill `OverlappingPatches`, have units of 8 x 8 patches, and mask 60 % of them; the two last stages, and
the first block of the third, see everything.

Pooling is the largest of 2 x 2, of the queries and of what goes past them, and the classifier reads the mean of all
elements, normed after it. A released model that classifies pools three times. The same model is pre-trained with two
poolings, so that a unit ends as 2 x 2 elements and its last two stages are of one size; the published code fuses only
the stages up to there. Here pre-training pools as often as the classifier does, to one element a unit.
"""

from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.vision.backbones.q_pooled_attention import q_pooled_attention
from deltax.papers.vision.backbones.vit import ViT
from deltax.papers.vision.self_supervised.mae import mae
from deltax.parts.attention.context import Context
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import XavierLinear
from deltax.parts.model.patches import Grid, LearnedGrid, Mean, Pooled, pair
from deltax.parts.model.stack import Stages
from deltax.shapes import Images, OtherStream, Stream


class MaskUnits(nn.Module):
    """The inner mixer, inside each run of `unit` elements alone. Stream (B, T, D) -> (B, T', D')."""

    def __init__(self, dim: int, *, inner: Part, unit: int):
        super().__init__()
        self.unit = unit
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        ctx.refuse(self, "state", "segments", "place")
        units = self.inner(x.unflatten(1, (-1, self.unit)).flatten(0, 1), Context())
        return units.unflatten(0, (len(x), -1)).flatten(1, 2)


class Fused(nn.Module):
    """The last stage's view of each unit, and every earlier one's mapped to it, summed. Stream (B, T, D) -> (B, U, W).

    The inner part is `Stages` whose merges pool by `stride`, to one element a unit.
    """

    def __init__(self, dim: int, *, inner: Part, stride: int = 4, embed: Part = part(XavierLinear)):
        super().__init__()
        self.inner = inner(dim)
        self.width = self.inner.width
        levels = len(self.inner.merges)
        self.heads = nn.ModuleList(embed(dim * 2**i * stride ** (levels - i), self.width) for i in range(levels))

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        *views, last = self.inner.each(x, ctx)
        for head, view in zip(self.heads, views, strict=True):
            last = last + head(view.reshape(*last.shape[:2], -1))
        return last


class InUnits(nn.Module):
    """The inner trunk, as one whose tokens are mask units of 2^levels x 2^levels patches."""

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
        """What the trunk makes of these units, (B, N, W)."""
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
            raise UserError(f"an image of {rows} x {columns} pixels is no multiple of the stride {self.patch}")
        return rows // self.patch, columns // self.patch

    def forward(self, images: Images) -> Stream:
        return self.conv(images).flatten(2).mT


class NormedMean(Mean):
    """The mean over the stream, then its norm. (B, T, D) -> (B, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__(dim)
        self.norm = norm(dim)

    def forward(self, x: Stream) -> Pooled:
        return self.norm(super().forward(x))


@paper(
    on=(mae, q_pooled_attention),
    replaces=(mae, q_pooled_attention),
    year=2023,
    arxiv="2306.00989",
    whole="vit+q-pooled-attention",
)
def hiera(recipe: Part, *, local: int = 1) -> Part:
    """Attention inside mask units in the first `local` stages and the merges after them."""
    masked = "pixel_decoder" in recipe.slots()
    trunk = recipe["model.trunk"]
    if trunk["stack"].target is not Stages:
        raise UserError(f"{recipe.title} has no stages to keep local; write vit+q-pooled-attention+hiera")
    stages, merges, norm = list(trunk["stack.stages"]), list(trunk["stack.merges"]), trunk["norm"]
    levels = len(merges)
    for i in range(min(local, len(stages))):
        stages[i] = stages[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
        if i < levels:
            merges[i] = merges[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
    stack = part(trunk["stack"], stages=tuple(stages), merges=tuple(merges))
    recipe = recipe.set(ViT, position=LearnedGrid, stack=stack)
    if masked:
        return recipe.set(ViT, stack=part(Fused, inner=stack)).wrap("trunk", InUnits, levels=levels)
    return recipe.set(ViT, norm=Identity).fill("pool", NormedMean, norm=norm)
