"""Boxes: conversions, overlaps, and the suppression of duplicates.

A box is (cx, cy, w, h), its centre and size, or, where a function says corners, (x0, y0, x1, y1) with x0 <= x1 and
y0 <= y1. Any unit will do as long as it is one; models here use the image's width and height as 1.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TINY = 1e-12  # keeps 0/0 out of the overlap of two empty boxes


class Detections(NamedTuple):
    """What a detector says of each image; a score of 0 stands where it says nothing."""

    scores: Float[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    boxes: Float[Tensor, "B N 4"]


def corners(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """(cx, cy, w, h) as (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def centred(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """(x0, y0, x1, y1) as (cx, cy, w, h)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    """Of boxes given by their corners."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def iou(a: Float[Tensor, "*#B 4"], b: Float[Tensor, "*#B 4"]) -> Float[Tensor, "*B"]:
    """Intersection over union of boxes given by their corners, pair by pair; the leading axes broadcast.

    All pairs of N and M boxes are `iou(a[:, None], b)`. Two boxes without area overlap by 0.
    """
    inside, union, _ = _overlap(a, b)
    return inside / union.clamp(min=_TINY)


def giou(a: Float[Tensor, "*#B 4"], b: Float[Tensor, "*#B 4"]) -> Float[Tensor, "*B"]:
    """IoU less the share of the hull that neither box covers, in (-1, 1] (arXiv:1902.09630, Algorithm 1).

    Boxes by their corners, broadcast as in `iou`. Unlike IoU it has a gradient where boxes do not touch.
    """
    inside, union, hull = _overlap(a, b)
    return inside / union.clamp(min=_TINY) - (hull - union) / hull.clamp(min=_TINY)


def nms(boxes: Float[Tensor, "N 4"], scores: Float[Tensor, "N"], threshold: float = 0.5) -> Bool[Tensor, "N"]:
    """Greedy non-maximum suppression: which boxes, given by their corners, are kept.

    From the highest score down, a kept box removes those after it that overlap it by more than the threshold.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = iou(boxes[order][:, None], boxes[order]) > threshold
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if kept[order[i]]:
            kept[order[i + 1 :][overlaps[i, i + 1 :]]] = False
    return kept


def suppress(found: Detections, threshold: float = 0.5) -> Detections:
    """Detections (cx, cy, w, h) after `nms` in each class of each image; what is removed scores 0."""
    scores = found.scores.clone()
    for i, (score, label, box) in enumerate(zip(*found, strict=True)):
        for name in label.unique():
            here = (label == name).nonzero()[:, 0]
            scores[i, here[~nms(corners(box[here]), score[here], threshold)]] = 0.0
    return Detections(scores, found.labels, found.boxes)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The areas of intersection, union and hull."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    union = area(a) + area(b) - inside
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    return inside, union, (high - low).prod(-1)
