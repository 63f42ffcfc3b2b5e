"""Per-Pixel Classification is Not All You Need for Semantic Segmentation. Cheng, Schwing, Kirillov, 2021.
arXiv:2107.06278

DETR, but each query says a class and a mask instead of a box: its mask is its product with an embedding of each pixel.

A classifier of pixels can only say of what kind each pixel is; two things of one kind that touch are one to it. Here
a pyramid embeds every pixel, a query embeds a mask, and where the two agree the mask is. Which mask has which class is
said once for the mask, not for each pixel, so one model and one loss serve semantic, instance and panoptic
segmentation. There is no encoder; the queries read the deepest map. The paper has 6 layers and 100 queries; the
default here learns small scenes from nothing.

Panoptic inference follows the released code: a query is kept from a class probability above 0.8 on, each pixel goes to
the kept query of the largest p_i m_i, and a query is dropped that wins less than 0.8 times the area of its binary mask.
The paper says instead that the binary mask is largely occluded, which would count only what is won inside of it. There
every pixel is labelled, so every pixel that is won is kept, `panoptic(least=0)`; here scenes have empty ground, and a
won pixel counts from m_i of one half on, as in the code released with Mask2Former. transformers multiplies m_i by p_i
before it takes the binary mask, resizes probabilities where released code resizes logits, and drops a query at 0.8.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_MASKS, needs
from deltax.papers.detection.detr import class_loss, detr, grid_sinusoids, match
from deltax.papers.detection.fpn import top_down
from deltax.papers.detection.retinanet import focal
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.resnet import Backbone
from deltax.parts.attention.context import Context
from deltax.parts.detection.masks import (
    Segments,
    dice,
    dice_of_pairs,
    instances,
    panoptic,
    resized,
    share,
)
from deltax.parts.model.convolution import ConvNorm, GroupNorm, SmallStem
from deltax.parts.model.language_model import Embedding
from deltax.parts.model.linear import XavierLinear
from deltax.parts.numerics.precision import at_least_float32, in_float32, in_full
from deltax.parts.training.run import Loop
from deltax.shapes import Features, Images, Maps, PerExample
from deltax.tasks.detection.masks import MaskBatch, MaskScenes


class MaskPredictions(NamedTuple):
    """What each query says after each of L layers: class logits, no object last, and the logit of every pixel."""

    logits: Float[Tensor, "L B N V"]
    masks: Float[Tensor, "L B N _ _"]


Answer = Callable[[Features], tuple[Tensor, Tensor]]


class PixelPyramid(nn.Module):
    """The backbone's maps -> embeddings of the pixels of the finest, and the maps that queries read: the deepest one.

    An FPN with a norm in every step and a convolution after every sum (section 3.2, "pixel decoder").
    """

    def __init__(self, widths: tuple[int, ...], dim: int, *, map_norm: Part = part(GroupNorm)):
        super().__init__()
        *finer, deepest = widths
        self.stem = ConvNorm(deepest, dim, map_norm=map_norm)
        self.lateral = nn.ModuleList([ConvNorm(width, dim, size=1, map_norm=map_norm) for width in reversed(finer)])
        self.smooth = nn.ModuleList([ConvNorm(dim, dim, map_norm=map_norm) for _ in finer])
        self.pixels = nn.Conv2d(dim, dim, 3, padding=1)
        self.project = nn.Conv2d(deepest, dim, 1)

    def forward(self, maps: list[Maps]) -> tuple[Maps, list[Maps]]:
        *finer, deepest = maps
        x = torch.relu(self.stem(deepest))
        for lateral, smooth, m in zip(self.lateral, self.smooth, reversed(finer), strict=True):
            x = torch.relu(smooth(top_down(x, lateral(m))))
        return self.pixels(x), [self.project(deepest)]


class MaskHead(nn.Module):
    """Of the normed stream, class logits by a linear map and the embedding of a mask by three; its product with each
    pixel's is the mask. (..., B, N, D), (B, D, Y, X) -> (..., B, N, V + 1), (..., B, N, Y, X)."""

    def __init__(self, dim: int, classes: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(dim)
        self.classes = XavierLinear(dim, classes + 1)
        self.mask = nn.ModuleList([XavierLinear(dim, dim), XavierLinear(dim, dim), XavierLinear(dim, dim)])

    def forward(self, x: Features, pixels: Maps) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        first, second, last = self.mask
        mask = last(torch.relu(second(torch.relu(first(x)))))
        return self.classes(x), torch.einsum("...bnd,bdyx->...bnyx", mask, pixels)


class OneMap(nn.Module):
    """Queries that start as zeros, as DETR's do, and read one map in every layer of `inner`."""

    def __init__(self, dim: int, queries: int, *, inner: Part):
        super().__init__()
        self.queries = Embedding(queries, dim, std=1.0)
        self.layers = inner(dim)

    def forward(self, maps: list[Maps], answer: Answer) -> MaskPredictions:
        [memory] = maps
        queries = self.queries.weight.expand(len(memory), -1, -1)
        ctx = Context(pos_embed=queries, memory=memory.flatten(2).mT, memory_pos_embed=places(memory))
        return MaskPredictions(*answer(torch.stack(list(self.layers.each(torch.zeros_like(queries), ctx)))))


def places(maps: Maps) -> Float[Tensor, "S D"]:
    """The sinusoids of the cells of a map, row by row."""
    return grid_sinusoids(*maps.shape[-2:], maps.shape[1], maps.device).to(maps.dtype)


class MaskFormer(nn.Module):
    """Images (B, C, Y, X) -> `MaskPredictions` of N queries (Figure 2). `channels` and `classes` are the task's."""

    interface = IMAGES_TO_MASKS

    def __init__(
        self, channels: int, classes: int, *, dim: int, queries: int, backbone: Part, decoder: Part,
        pixel_pyramid: Part = part(PixelPyramid), mask_head: Part = part(MaskHead),
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone(channels)
        self.pixel_pyramid = pixel_pyramid(self.backbone.widths, dim)
        self.decoder = decoder(dim, queries)
        self.mask_head = mask_head(dim, classes)

    def forward(self, images: Images) -> MaskPredictions:
        pixels, maps = self.pixel_pyramid(list(self.backbone.each(images)))
        return self.decoder(maps, lambda x: self.mask_head(x, pixels))

    def last(self, images: Images) -> tuple[Float[Tensor, "B N V"], Float[Tensor, "B N Y X"]]:
        """What the last layer says, masks at the size of the images."""
        said = self(images)
        return said.logits[-1], resized(said.masks[-1], *images.shape[-2:])

    def segment(self, images: Images) -> Segments:
        """Every query's class, score and mask."""
        return instances(*self.last(images))

    def panoptic(self, images: Images) -> Int[Tensor, "B Y X 2"]:
        """The class and the query that each pixel is of."""
        return panoptic(*self.last(images))


def cells(masks: Float[Tensor, "L B N _ _"], truth: Float[Tensor, "B M Y X"]) -> tuple[Tensor, Tensor]:
    """Where masks are compared: at every cell, the truth's nearest pixel. -> (L, B, N, P), (B, M, P)."""
    truth = nn.functional.interpolate(truth, size=masks.shape[-2:], mode="nearest")
    return masks.flatten(3), truth.flatten(2)


def pixels(masks: Float[Tensor, "R _ _"], truth: Float[Tensor, "R Y X"]) -> tuple[Tensor, Tensor]:
    """Where matched masks learn: at every pixel of the truth. -> (R, P), (R, P)."""
    return resized(masks, *truth.shape[-2:]).flatten(1), truth.flatten(1)


def mask_set_loss(
    said: MaskPredictions, batch: MaskBatch, *, matching_points: Part = part(cells), loss_points: Part = part(pixels),
    pixel_loss: Part = part(focal), weights: tuple[float, float, float] = (1.0, 20.0, 1.0), no_object: float = 0.1,
) -> PerExample:  # fmt: skip
    """The sum over layers of cross-entropy, pixel loss and dice under the cheapest matching, of each scene (Eq. 2).

    `weights` are those of the three in this order, in the matching too, where a class costs minus its probability. The
    mean over the batch is the paper's loss: a mean over queries of the class, over masks of the whole batch of the
    rest. A scene's share needs only `batch.objects` of the others.
    """
    layers, scenes, queries, _ = said.logits.shape
    of_class, of_pixels, of_dice = weights
    truth, labels = batch.masks.to(said.masks.dtype), batch.labels
    if not labels.shape[1]:  # maps without channels are not resized
        truth, labels = truth.new_zeros(scenes, 1, *truth.shape[2:]), labels.new_full((scenes, 1), -1)
    with torch.no_grad(), in_full(truth):
        label = labels.clamp(min=0)[None, :, None].expand(layers, -1, queries, -1)
        ours, theirs = matching_points(said.masks, truth)
        apart = pairs(pixel_loss, ours, theirs)
        cost = of_pixels * apart + of_dice * dice_of_pairs(ours, theirs)
        cost = cost - of_class * said.logits.softmax(-1).gather(-1, label)
        real = (labels >= 0).repeat(layers, 1)
        matched = match(cost.flatten(0, 1), real).view(layers, scenes, queries)

    layer, scene, query = (matched >= 0).nonzero(as_tuple=True)
    ours, theirs = loss_points(said.masks[layer, scene, query], truth[scene, matched[layer, scene, query]])
    each = of_pixels * pixel_loss(ours, theirs).mean(-1) + of_dice * dice(ours, theirs)
    of_masks = share(each, scene, scenes) / batch.objects.clamp(min=1e-6)
    return of_class * class_loss(said.logits, matched, labels, batch.objects, no_object=no_object).sum(0) + of_masks


@in_float32
def pairs(
    pixel_loss: Callable[[Tensor, Tensor], Tensor], logits: Float[Tensor, "L B N P"], truth: Float[Tensor, "B M P"]
) -> Float[Tensor, "L B N M"]:
    """The mean pixel loss of every one of N masks with every one of M, by its values at one and at zero: exact where
    the truth is either, or the loss linear in it."""
    at_one, at_zero = (pixel_loss(logits, torch.full_like(logits, value)) for value in (1.0, 0.0))
    return (at_one @ truth.mT + at_zero @ (1 - truth).mT) / logits.shape[-1]


@needs("images", "labels", "masks", "objects", model=IMAGES_TO_MASKS)
def mask_classification(
    model: nn.Module, batch: MaskBatch, *, matching_points: Part = part(cells), loss_points: Part = part(pixels),
    pixel_loss: Part = part(focal), weights: tuple[float, float, float] = (1.0, 20.0, 1.0), no_object: float = 0.1,
) -> PerExample:  # fmt: skip
    """`mask_set_loss` of what the model says of the images."""
    said = MaskPredictions(*(at_least_float32(t) for t in model(batch.images)))
    return mask_set_loss(
        said, batch, matching_points=matching_points, loss_points=loss_points, pixel_loss=pixel_loss, weights=weights,
        no_object=no_object,
    )  # fmt: skip


@paper(on=detr, year=2021, arxiv="2107.06278")
def maskformer() -> Part:
    recipe = detr.fill("model", MaskFormer, dim=32).wrap("decoder", OneMap)
    recipe = recipe.set(SmallStem, stride=1).set(Backbone, stem_width=16, widths=(16, 32, 32, 64), depths=(1, 1, 1, 1))
    return recipe.fill("task", MaskScenes, most=3).fill("objective", mask_classification).set(Loop, steps=1000)
