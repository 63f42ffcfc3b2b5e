"""Masked-attention Mask Transformer for Universal Image Segmentation. Cheng, Misra, Schwing, Kirillov, Girdhar, 2021.
arXiv:2112.01527

MaskFormer, but each layer's queries look only inside the masks that the layer before said, on finer and finer maps.

A query that may look anywhere takes hundreds of epochs to look at its object. Here it has said where that is, and
attention elsewhere is minus infinity; a query that has found nothing looks everywhere. Layers take turns through three
maps of a deformable pixel decoder, coarse to fine. Queries are learned, say a mask before the first layer, ask the
memory before they ask each other, and learn at a few sampled points, most of them where the mask is unsure. The paper
has 6 layers in the pixel decoder and 9 for 100 queries, and 12544 points; the released code adds the finest map to the
next one bilinearly, as is done here. Its panoptic inference is MaskFormer's, but a won pixel is kept only where the
mask has a probability of at least one half; the paper does not say so. It is the rule taken here.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.detection.maskformer import (
    Answer,
    MaskPredictions,
    mask_classification,
    maskformer,
    places,
)
from deltax.papers.language.models.transformer import DecoderBlock, transformer
from deltax.parts.attention.context import Context
from deltax.parts.attention.deformable import DeformableAttention
from deltax.parts.detection.masks import binary_cross_entropy, resized
from deltax.parts.model.convolution import ConvNorm, GroupNorm
from deltax.parts.model.language_model import Embedding
from deltax.parts.model.stack import Stack
from deltax.shapes import Maps, Stream

LEVELS = 3


class DeformablePyramid(nn.Module):
    """The backbone's maps -> embeddings of the pixels of the finest, and the three deepest, coarse to fine, after an
    encoder in which each cell reads points of all three (section 3.2.2).

    Maps finer than these are added from the top down, as in an FPN. Raises UserError for fewer than three maps.
    """

    def __init__(self, widths: tuple[int, ...], dim: int, *, encoder: Part, map_norm: Part = part(GroupNorm)):
        super().__init__()
        if len(widths) < LEVELS:
            raise UserError(
                f"a backbone of {len(widths)} stages has too few maps: Mask2Former reads {LEVELS}; set widths"
            )
        coarse, finer = widths[: -LEVELS - 1 : -1], widths[:-LEVELS][::-1]
        self.project = nn.ModuleList([nn.Sequential(nn.Conv2d(w, dim, 1), map_norm(dim)) for w in coarse])
        self.level = Embedding(LEVELS, dim, std=1.0)
        self.encoder = encoder(dim)
        self.lateral = nn.ModuleList([ConvNorm(width, dim, size=1, map_norm=map_norm) for width in finer])
        self.smooth = nn.ModuleList([ConvNorm(dim, dim, map_norm=map_norm) for _ in finer])
        self.pixels = nn.Conv2d(dim, dim, 1)

    def forward(self, maps: list[Maps]) -> tuple[Maps, list[Maps]]:
        coarse = [project(m) for project, m in zip(self.project, reversed(maps[-LEVELS:]), strict=True)]
        grids = tuple((m.shape[-2], m.shape[-1]) for m in coarse)
        pos_embed = torch.cat([places(m) + level for m, level in zip(coarse, self.level.weight, strict=True)])
        read = self.encoder(torch.cat([m.flatten(2).mT for m in coarse], 1), Context(pos_embed=pos_embed, grids=grids))
        parts = read.split([rows * columns for rows, columns in grids], 1)
        read_maps = [p.mT.unflatten(2, grid) for p, grid in zip(parts, grids, strict=True)]
        x = read_maps[-1]
        for lateral, smooth, m in zip(self.lateral, self.smooth, reversed(maps[:-LEVELS]), strict=True):
            x = torch.relu(smooth(resized(x, *m.shape[-2:]) + lateral(m)))
        return self.pixels(x), read_maps


class CrossFirst(DecoderBlock):
    """A `DecoderBlock` that asks the memory before its stream asks itself: queries know nothing of the image yet."""

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.mlp_branch(self.mixer_branch(self.cross_branch(x, ctx), ctx), ctx)


@torch.no_grad()
def masked_attention(masks: Float[Tensor, "B N _ _"], rows: int, columns: int) -> Bool[Tensor, "B N _"]:
    """Where each query may look on a map of rows x columns: where its mask, so resized, is at least one half, or
    everywhere if that is nowhere (Eq. 2 and 3)."""
    seen = resized(masks, rows, columns).flatten(2) >= 0
    return seen | ~seen.any(-1, keepdim=True)


def anywhere(masks: Float[Tensor, "B N _ _"], rows: int, columns: int) -> None:
    """Plain cross-attention: no query is told where to look."""


class MaskedQueries(nn.Module):
    """Queries that are learned and say masks from the start; layer after layer of `inner` they read one map after the
    other, each only where `attention_mask` lets it, of what it said last (section 3.2.1)."""

    def __init__(self, dim: int, queries: int, *, inner: Part, attention_mask: Part = part(masked_attention)):
        super().__init__()
        self.features, self.queries = Embedding(queries, dim, std=1.0), Embedding(queries, dim, std=1.0)
        self.level = Embedding(LEVELS, dim, std=1.0)
        self.layers = inner(dim)
        self.attention_mask = attention_mask

    def forward(self, maps: list[Maps], answer: Answer) -> MaskPredictions:
        memory = [m.flatten(2).mT + level for m, level in zip(maps, self.level.weight, strict=True)]
        x, pos_embed = (table.weight.expand(len(maps[0]), -1, -1) for table in (self.features, self.queries))
        said = [answer(x)]
        for i, block in enumerate(self.layers.blocks):
            level = i % len(maps)
            seen = self.attention_mask(said[-1][1], *maps[level].shape[-2:])
            x = block(
                x,
                Context(
                    pos_embed=pos_embed, memory=memory[level], memory_pos_embed=places(maps[level]), memory_mask=seen
                ),
            )
            said.append(answer(x))
        return MaskPredictions(*(torch.stack(each) for each in zip(*said, strict=True)))


def sampled(masks: Float[Tensor, "B N _ _"], points: Float[Tensor, "B P 2"]) -> Float[Tensor, "B N P"]:
    """N masks at points (x, y), each mask as 1, bilinearly between pixels' centres and zero outside."""
    return nn.functional.grid_sample(masks, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def random_points(
    masks: Float[Tensor, "L B N _ _"], truth: Float[Tensor, "B M Y X"], *, count: int = 144
) -> tuple[Tensor, Tensor]:
    """Where masks are compared: at points drawn for each scene, all masks' alike. -> (L, B, N, P), (B, M, P)."""
    points = torch.rand(len(truth), count, 2, dtype=truth.dtype, device=truth.device)
    ours = sampled(masks.transpose(0, 1).flatten(1, 2), points)
    return ours.unflatten(1, (len(masks), -1)).transpose(0, 1), sampled(truth, points)


def uncertain_points(
    masks: Float[Tensor, "R _ _"], truth: Float[Tensor, "R Y X"], *, count: int = 144, oversample: float = 3.0,
    share: float = 0.75,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where matched masks learn: a `share` of the points are those, of `oversample` times as many drawn, at which the
    mask is least sure, and the rest are drawn (arXiv:1912.08193, section 3.1). -> (R, P), (R, P)."""
    draw = lambda n: torch.rand(len(masks), n, 2, dtype=masks.dtype, device=masks.device)
    masks, truth = masks[:, None], truth[:, None]
    unsure = int(share * count)
    with torch.no_grad():
        points = draw(int(oversample * count))
        chosen = sampled(masks, points)[:, 0].abs().topk(unsure, largest=False).indices
        points = torch.cat([points.gather(1, chosen[..., None].expand(-1, -1, 2)), draw(count - unsure)], 1)
        theirs = sampled(truth, points)[:, 0]
    return sampled(masks, points)[:, 0], theirs


@paper(on=maskformer, year=2021, arxiv="2112.01527")
def mask2former() -> Part:
    encoder = transformer["model.encoder"].set(Stack, depth=1).fill("mixer", DeformableAttention, points=2)
    recipe = maskformer.fill("pixel_pyramid", DeformablePyramid, encoder=encoder)
    recipe = recipe.fill("decoder", MaskedQueries).put("model.decoder.inner.depth", LEVELS)
    recipe = recipe.rewrite(lambda _, old: part(CrossFirst, **dict(old.kwargs)) if old.target is DecoderBlock else old)
    return recipe.set(
        mask_classification, matching_points=random_points, loss_points=uncertain_points,
        pixel_loss=binary_cross_entropy, weights=(2.0, 5.0, 5.0),
    )  # fmt: skip
