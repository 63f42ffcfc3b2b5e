"""Masks of objects: how far two are apart, and what a set of queries that each name a class and a mask says in all."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor, nn

from deltax.contract import needs
from deltax.parts.detection.boxes import of_found
from deltax.parts.numerics.precision import at_least_float32, in_float32
from deltax.recipe import Part
from deltax.shapes import Images, Maps, PerExample


class Segments(NamedTuple):
    """What was found in each image: a score in [0, 1], a class, and the pixels of each of N things."""

    scores: Float[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    masks: Bool[Tensor, "B N Y X"]


@in_float32
def dice(logits: Float[Tensor, "*B P"], truth: Float[Tensor, "*B P"]) -> Float[Tensor, "*B"]:
    """1 - (2 sum m g + 1) / (sum m + sum g + 1) over P pixels of a mask m, given by its logits, and g (V-Net's, with
    one added to both)."""
    mask, truth = at_least_float32(logits).sigmoid(), at_least_float32(truth)
    return 1 - (2 * (mask * truth).sum(-1) + 1) / (mask.sum(-1) + truth.sum(-1) + 1)


@in_float32
def dice_of_pairs(logits: Float[Tensor, "L B N P"], truth: Float[Tensor, "B M P"]) -> Float[Tensor, "L B N M"]:
    """`dice` of every one of N masks, after each of L layers, with every one of M."""
    mask, truth = at_least_float32(logits).sigmoid(), at_least_float32(truth)
    both = mask.sum(-1)[..., :, None] + truth.sum(-1)[..., None, :]
    return 1 - (2 * mask @ truth.mT + 1) / (both + 1)


def binary_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """-g log m - (1 - g) log(1 - m), elementwise, of a mask m given by its logits."""
    return nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def resized(masks: Float[Tensor, "*B Y X"], rows: int, columns: int) -> Tensor:
    """Masks of logits, bilinearly at another size. (..., Y, X) -> (..., rows, columns)."""
    if masks.shape[-2:] == (rows, columns):
        return masks
    flat = masks.flatten(0, -3)[:, None]
    larger = nn.functional.interpolate(flat, size=(rows, columns), mode="bilinear", align_corners=False)
    return larger[:, 0].unflatten(0, masks.shape[:-2])


@in_float32
def semantic(logits: Float[Tensor, "B N V"], masks: Float[Tensor, "B N Y X"]) -> Float[Tensor, "B _ Y X"]:
    """sum_i p_i(c) m_i, for each class but the last, which is no object (arXiv:2107.06278, section 3.4)."""
    return torch.einsum("bnv,bnyx->bvyx", logits.softmax(-1)[..., :-1], masks.sigmoid())


def instances(logits: Float[Tensor, "B N V"], masks: Float[Tensor, "B N Y X"]) -> Segments:
    """Each query's likeliest class and its mask where above one half.

    The score is the class's probability times the mean probability of the mask's own pixels.
    """
    scores, labels = at_least_float32(logits).softmax(-1)[..., :-1].max(-1)
    chance = at_least_float32(masks).sigmoid()
    inside = chance > 0.5
    sure = (chance * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
    return Segments(scores * sure, labels, inside)


def panoptic(
    logits: Float[Tensor, "B N V"],
    masks: Float[Tensor, "B N Y X"],
    *,
    sure: float = 0.8,
    seen: float = 0.8,
    least: float = 0.5,
    stuff: tuple[int, ...] = (),
) -> Int[Tensor, "B Y X 2"]:
    """The class and the query of every pixel, both -1 where there is nothing (arXiv:2107.06278, section 3.4).

    sure   queries that name no object, or one with a probability p_i of at most `sure`, are left out
    seen   each pixel is won by argmax_i p_i m_i; a query that wins fewer than `seen` times as many pixels as its own
           mask has (m_i of at least one half) is dropped, and what it has won stays empty
    least  a won pixel is the query's where m_i is at least `least`: 0.5 as released with Mask2Former, 0 as with
           MaskFormer, where each pixel is somebody's
    stuff  classes whose queries are one segment, that of the first of them
    """
    scores, labels = at_least_float32(logits).softmax(-1).max(-1)
    kept = (labels < logits.shape[-1] - 1) & (scores > sure)
    chance = at_least_float32(masks).sigmoid()
    claimed = torch.where(kept[..., None, None], scores[..., None, None] * chance, -1.0)
    winner = claimed.argmax(1, keepdim=True)
    won = torch.zeros_like(claimed, dtype=torch.bool).scatter_(1, winner, True)
    whole, area = ((m.flatten(2).sum(-1)) for m in (chance >= 0.5, won))
    kept = kept & (whole > 0) & (area > 0) & (area / whole.clamp(min=1) >= seen)
    won = won & (chance >= least) & kept[..., None, None]
    mine = torch.where(won.flatten(2).any(-1), labels, -1)
    which = torch.where(won.any(1), winner[:, 0], -1)
    label = torch.where(which >= 0, labels.gather(1, which.clamp(min=0).flatten(1)).view_as(which), -1)
    for kind in stuff:
        first = (mine == kind).int().argmax(1)[:, None, None]
        which = torch.where(label == kind, first, which)
    return torch.stack([label, which], -1)


def share(each: Float[Tensor, "R"], row: Int[Tensor, "R"], rows: int) -> PerExample:
    """The sum of `each` by the row that it belongs to, (R,) -> (rows,)."""
    return each.new_zeros(rows).index_add(0, row, each)


class PixelClassifier(nn.Module):
    """The class of every pixel, the last being ground: what mask classification is compared with.

    Images (B, C, Y, X) -> logits (B, V, Y, X). `channels` and `classes` are the task's; the pixel decoder is as in
    `deltax.papers.detection.maskformer`, its maps for queries unread.
    """

    def __init__(self, channels: int, classes: int, *, dim: int, backbone: Part, pixel_pyramid: Part):
        super().__init__()
        self.backbone = backbone(channels)
        self.pixel_pyramid = pixel_pyramid(self.backbone.widths, dim)
        self.classes = nn.Conv2d(dim, classes + 1, 1)

    def forward(self, images: Images) -> Maps:
        pixels, _ = self.pixel_pyramid(list(self.backbone.each(images)))
        return resized(self.classes(torch.relu(pixels)), *images.shape[-2:])

    def panoptic(self, images: Images) -> Int[Tensor, "B Y X 2"]:
        """The class of each pixel, and the number of the patch that it hangs together with; both -1 on the ground."""
        logits = self(images)
        label = logits.argmax(1)
        label = torch.where(label == logits.shape[1] - 1, -1, label)
        number = np.full(label.shape, -1)
        for i, scene in enumerate(label.cpu().numpy()):
            count = 0
            for kind in np.unique(scene[scene >= 0]):
                patches, found = ndimage.label(scene == kind)
                number[i][patches > 0] = patches[patches > 0] - 1 + count
                count += found
        return torch.stack([label, torch.from_numpy(number).to(label.device)], -1)


@needs("images", "labels", "masks")
def classify_pixels(model: nn.Module, batch: Any) -> PerExample:
    """The mean cross-entropy of the pixels of each scene, of a batch with masks."""
    logits = at_least_float32(model(batch.images))
    ground = logits.shape[1] - 1
    if batch.masks.shape[1]:
        which = torch.where(batch.masks.any(1), batch.masks.int().argmax(1), -1)
        label = of_found(batch.labels, which.flatten(1), ground).view(which.shape)
    else:
        label = torch.full_like(logits[:, 0], ground, dtype=torch.long)
    return nn.functional.cross_entropy(logits, label, reduction="none").mean((1, 2))
