"""Per-Pixel Classification is Not All You Need for Semantic Segmentation. Cheng, Schwing, Kirillov, 2021.
arXiv:2107.06278

DETR, but each query predicts a mask in place of a box: the dot product of query and pixel embedding.

Per-pixel classification assigns a class to each pixel, so two touching objects of one class merge. Here an FPN-like
pixel decoder embeds every pixel and each query predicts a mask embedding; their dot product is the mask logit. The
class is predicted once for the mask, so one model and one loss serve semantic, instance and panoptic segmentation.
There is no transformer encoder; the queries attend to the deepest map. The paper has 6 layers and 100 queries.

Panoptic inference follows the released code: queries with a class probability above 0.8 are kept, each pixel goes to
the kept query with the largest p_i m_i, and a query is dropped if it wins less than 0.8 times the area of its binary
mask. The paper instead drops a query whose binary mask is largely occluded, which would count only pixels won inside
it. There every pixel has a label, so every won pixel is kept: `panoptic(least=0)`. Scenes here have background, so a
won pixel is kept from m_i = 0.5 on, as in Mask2Former's code. transformers multiplies m_i by p_i before it binarizes,
resizes probabilities where the released code resizes logits, and drops a query at 0.8.
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
from deltax.parts.model.linear import Glorot
from deltax.parts.numerics.precision import at_least_float32, in_float32, in_full
from deltax.parts.training.run import Loop
from deltax.shapes import Features, Images, Maps, PerExample
from deltax.tasks.detection.masks import MaskBatch, MaskScenes


class MaskPredictions(NamedTuple):
    """The output of each of L layers for N queries: class logits, "no object" last, and a logit for every pixel."""

    logits: Float[Tensor, "L B N V"]
    masks: Float[Tensor, "L B N _ _"]


Answer = Callable[[Features], tuple[Tensor, Tensor]]  # the mask head with its pixel embeddings bound


class PixelPyramid(nn.Module):
    """The pixel decoder (section 3.2): backbone maps -> pixel embeddings (B, D, Y', X') of the finest map, and [the
    deepest map (B, D, Y'', X'')] for the queries.

    An FPN with a norm in every step and a 3 x 3 convolution after every sum.
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
        x = torch.relu(self.stem(deepest))  # (B, D, Y'', X'')
        for lateral, smooth, m in zip(self.lateral, self.smooth, reversed(finer), strict=True):
            x = torch.relu(smooth(top_down(x, lateral(m))))
        return self.pixels(x), [self.project(deepest)]


class MaskHead(nn.Module):
    """Norm, then class logits by a linear map and a mask embedding by a three-layer MLP.

    (..., B, N, D), pixels (B, D, Y, X) -> class logits (..., B, N, V + 1), mask logits (..., B, N, Y, X).
    """

    def __init__(self, dim: int, classes: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(dim)
        self.classes = Glorot(dim, classes + 1)
        self.mask = nn.ModuleList([Glorot(dim, dim), Glorot(dim, dim), Glorot(dim, dim)])

    def forward(self, x: Features, pixels: Maps) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        first, second, last = self.mask
        mask = last(torch.relu(second(torch.relu(first(x)))))
        # m_i = E_mask_i . E_pix, as a logit
        return self.classes(x), torch.einsum("...bnd,bdyx->...bnyx", mask, pixels)


class OneMap(nn.Module):
    """Learned queries that start as zeros, as in DETR, and attend to one map in every layer of `inner`."""

    def __init__(self, dim: int, queries: int, *, inner: Part):
        super().__init__()
        self.queries = Embedding(queries, dim, std=1.0)
        self.layers = inner(dim)

    def forward(self, maps: list[Maps], answer: Answer) -> MaskPredictions:
        [memory] = maps
        queries = self.queries.weight.expand(len(memory), -1, -1)
        # (B, S, D), S = Y'' X''
        ctx = Context(place=queries, memory=memory.flatten(2).mT, memory_place=places(memory))
        return MaskPredictions(*answer(torch.stack(list(self.layers.each(torch.zeros_like(queries), ctx)))))


class MaskFormer(nn.Module):
    """Images (B, C, Y, X) -> `MaskPredictions` of N queries (Figure 2). The task gives `channels` and `classes`."""

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
        # the head is given to the decoder, since Mask2Former's decoder predicts masks between its layers
        return self.decoder(maps, lambda x: self.mask_head(x, pixels))

    def last(self, images: Images) -> tuple[Float[Tensor, "B N V"], Float[Tensor, "B N Y X"]]:
        """The last layer's class logits and masks, masks resized to the images."""
        said = self(images)
        return said.logits[-1], resized(said.masks[-1], *images.shape[-2:])

    def segment(self, images: Images) -> Segments:
        """Every query's class, score and mask."""
        return instances(*self.last(images))

    def panoptic(self, images: Images) -> Int[Tensor, "B Y X 2"]:
        """The class and the query index of each pixel."""
        return panoptic(*self.last(images))


def cells(masks: Float[Tensor, "L B N _ _"], truth: Float[Tensor, "B M Y X"]) -> tuple[Tensor, Tensor]:
    """The points of the matching: every cell of the predicted masks, with the nearest pixel of the true masks. -> (L,
    B, N, P), (B, M, P)."""
    truth = nn.functional.interpolate(truth, size=masks.shape[-2:], mode="nearest")
    return masks.flatten(3), truth.flatten(2)


def pixels(masks: Float[Tensor, "R _ _"], truth: Float[Tensor, "R Y X"]) -> tuple[Tensor, Tensor]:
    """The points of the loss: every pixel of the true masks, predictions resized. -> (R, P), (R, P)."""
    return resized(masks, *truth.shape[-2:]).flatten(1), truth.flatten(1)


@needs("images", "labels", "masks", "objects", model=IMAGES_TO_MASKS)
def mask_classification(
    model: nn.Module, batch: MaskBatch, *, compare_at: Part = part(cells), learn_at: Part = part(pixels),
    pixel_loss: Part = part(focal), weights: tuple[float, float, float] = (1.0, 20.0, 1.0), no_object: float = 0.1,
) -> PerExample:  # fmt: skip
    """`mask_set_loss` of the model's predictions for the images."""
    said = MaskPredictions(*(at_least_float32(t) for t in model(batch.images)))
    return mask_set_loss(
        said, batch, compare_at=compare_at, learn_at=learn_at, pixel_loss=pixel_loss, weights=weights,
        no_object=no_object,
    )  # fmt: skip


@paper(on=detr, year=2021, arxiv="2107.06278")
def maskformer() -> Part:
    recipe = detr.fill("model", MaskFormer, dim=32).wrap("decoder", OneMap)
    # four stages at strides 1 to 8 for scenes of a few dozen pixels
    recipe = recipe.set(SmallStem, stride=1).set(Backbone, stem_width=16, widths=(16, 32, 32, 64), depths=(1, 1, 1, 1))
    return recipe.fill("task", MaskScenes, most=3).fill("objective", mask_classification).set(Loop, steps=1000)


def places(maps: Maps) -> Float[Tensor, "S D"]:
    """The 2-D sine encodings of a map's cells, row by row. (B, D, Y, X) -> (Y X, D)."""
    return grid_sinusoids(*maps.shape[-2:], maps.shape[1], maps.device).to(maps.dtype)


def mask_set_loss(
    said: MaskPredictions, batch: MaskBatch, *, compare_at: Part = part(cells), learn_at: Part = part(pixels),
    pixel_loss: Part = part(focal), weights: tuple[float, float, float] = (1.0, 20.0, 1.0), no_object: float = 0.1,
) -> PerExample:  # fmt: skip
    """Cross-entropy, pixel loss and dice under the cheapest matching, summed over layers, for each scene (Eq. 2).

    `weights` are of (class, pixel loss, dice), in the matching too, where the class cost is minus its probability. The
    mean over the batch is the paper's loss: the class loss is a mean over queries, the other two over the masks of the
    whole batch. A scene needs only `batch.objects` of the other scenes.
    """
    layers, scenes, queries, _ = said.logits.shape
    of_class, of_pixels, of_dice = weights
    truth, labels = batch.masks.to(said.masks.dtype), batch.labels
    if not labels.shape[1]:  # maps without channels are not resized
        truth, labels = truth.new_zeros(scenes, 1, *truth.shape[2:]), labels.new_full((scenes, 1), -1)
    with torch.no_grad(), in_full(truth):
        label = labels.clamp(min=0)[None, :, None].expand(layers, -1, queries, -1)  # (L, B, N, M)
        ours, theirs = compare_at(said.masks, truth)
        apart = pairs(pixel_loss, ours, theirs)  # (L, B, N, M)
        cost = of_pixels * apart + of_dice * dice_of_pairs(ours, theirs)
        cost = cost - of_class * said.logits.softmax(-1).gather(-1, label)
        real = (labels >= 0).repeat(layers, 1)
        matched = match(cost.flatten(0, 1), real).view(layers, scenes, queries)

    # R matched queries over all layers and scenes; only their masks have a pixel loss
    layer, scene, query = (matched >= 0).nonzero(as_tuple=True)
    ours, theirs = learn_at(said.masks[layer, scene, query], truth[scene, matched[layer, scene, query]])
    each = of_pixels * pixel_loss(ours, theirs).mean(-1) + of_dice * dice(ours, theirs)
    # sum over each scene's masks
    of_masks = share(each, scene, scenes) / batch.objects.clamp(min=1e-6)
    return of_class * class_loss(said.logits, matched, labels, batch.objects, no_object=no_object).sum(0) + of_masks


@in_float32
def pairs(
    pixel_loss: Callable[[Tensor, Tensor], Tensor], logits: Float[Tensor, "L B N P"], truth: Float[Tensor, "B M P"]
) -> Float[Tensor, "L B N M"]:
    """The mean pixel loss of each of N masks with each of M true masks, as two matrix products.

    It interpolates between the loss at target 0 and at target 1: exact where targets are binary or the loss is linear
    in the target.
    """
    at_one, at_zero = (pixel_loss(logits, torch.full_like(logits, value)) for value in (1.0, 0.0))
    return (at_one @ truth.mT + at_zero @ (1 - truth).mT) / logits.shape[-1]  # (L, B, N, P) @ (B, P, M)
