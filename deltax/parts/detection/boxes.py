"""Boxes: conversions, overlaps, anchors, offsets, who answers for what, and the suppression of duplicates.

A box is (cx, cy, w, h), its centre and size, or, where a function says corners, (x0, y0, x1, y1) with x0 <= x1 and
y0 <= y1. Any unit will do as long as it is one; models here use the image's width and height as 1.

Boxes are computed in float32 at least: in float16 the area of 256 x 256 pixels is infinite, in bfloat16 a corner beyond
256 is no whole pixel. What is given in 16 bits comes back in 32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deltax.parts.numerics.precision import at_least_float32

NOTHING, IGNORED = -1, -2  # what `assign` gives a box that is background, and one that is neither
LARGEST = math.log(1000 / 16)  # how far an offset may scale a side, as in the code released with Fast R-CNN

_TINY = 1e-12  # keeps 0/0 out of the overlap of two empty boxes
_BLOCK = 256  # boxes that `nms` judges at a time


class Detections(NamedTuple):
    """What a detector says of each image; a score of 0 stands where it says nothing."""

    scores: Float[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    boxes: Float[Tensor, "B N 4"]


def corners(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """(cx, cy, w, h) as (x0, y0, x1, y1)."""
    boxes = at_least_float32(boxes)
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def centred(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """(x0, y0, x1, y1) as (cx, cy, w, h)."""
    boxes = at_least_float32(boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    """Of boxes given by their corners."""
    boxes = at_least_float32(boxes)
    return _area(boxes[..., 2:] - boxes[..., :2])


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


def clip(boxes: Float[Tensor, "*B 4"], rows: float, columns: float) -> Float[Tensor, "*B 4"]:
    """Corners moved into the image, [0, columns] by [0, rows]."""
    boxes = at_least_float32(boxes)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([columns, rows, columns, rows]))


def encode(boxes: Float[Tensor, "*#B 4"], anchors: Float[Tensor, "*#B 4"]) -> Float[Tensor, "*B 4"]:
    """The offsets (tx, ty, tw, th) that make `boxes` of `anchors`, both by their corners: how far the centre moves in
    widths and heights of the anchor, and the log of how much wider and higher it gets (arXiv:1311.2524, Eq. 6-9).
    """
    ours, theirs = centred(boxes), centred(anchors)
    scale = (ours[..., 2:].clamp(min=_TINY) / theirs[..., 2:]).log()
    return torch.cat([(ours[..., :2] - theirs[..., :2]) / theirs[..., 2:], scale], -1)


def decode(offsets: Float[Tensor, "*#B 4"], anchors: Float[Tensor, "*#B 4"]) -> Float[Tensor, "*B 4"]:
    """The corners that the offsets make of the anchors (Eq. 1-4 there): the inverse of `encode`, up to `LARGEST`."""
    offsets, theirs = at_least_float32(offsets), centred(anchors)
    centre = theirs[..., :2] + offsets[..., :2] * theirs[..., 2:]
    return corners(torch.cat([centre, theirs[..., 2:] * offsets[..., 2:].clamp(max=LARGEST).exp()], -1))


def anchor_grid(
    rows: int,
    columns: int,
    stride: float,
    *,
    sides: Sequence[float],
    ratios: Sequence[float],
    device: torch.device | None = None,
) -> Float[Tensor, "S 4"]:
    """Corners of boxes centred on every cell of a map, in pixels: S = rows * columns * sides * ratios, in this order.

    A side is the root of the area, a ratio height over width.
    """
    side, ratio = (torch.tensor(t, dtype=torch.float32, device=device) for t in (sides, ratios))
    high = side[:, None] * ratio.sqrt()
    size = torch.stack([side[:, None] / ratio.sqrt(), high], -1).flatten(0, 1)
    at = [(torch.arange(n, device=device) + 0.5) * stride for n in (rows, columns)]
    y, x = torch.meshgrid(*at, indexing="ij")
    centre = torch.stack([x, y], -1).flatten(0, 1)[:, None].expand(-1, len(size), -1)
    return corners(torch.cat([centre, size.expand_as(centre)], -1).flatten(0, 1))


def assign(
    overlaps: Float[Tensor, "*B N M"], real: Bool[Tensor, "*#B M"], *, low: float, high: float
) -> Int[Tensor, "*B N"]:
    """Of N boxes and M objects, which object each box answers for: its best overlap, if at least `high`.

    Below `low` it is NOTHING, between the two IGNORED. Objects that are not real count for nothing.
    """
    if not overlaps.shape[-1]:
        return torch.full(overlaps.shape[:-1], NOTHING, device=overlaps.device)
    best, which = overlaps.masked_fill(~real[..., None, :], -1.0).max(-1)
    return torch.where(best >= high, which, torch.where(best < low, NOTHING, IGNORED))


def rescue(
    found: Int[Tensor, "*B N"], overlaps: Float[Tensor, "*B N M"], real: Bool[Tensor, "*#B M"]
) -> Int[Tensor, "*B N"]:
    """What `assign` found, but a box that is the best overlap of any object answers for its own best object."""
    if not overlaps.shape[-1]:
        return found
    overlaps = overlaps.masked_fill(~real[..., None, :], 0.0)
    best = overlaps.amax(-2, keepdim=True)
    chosen = ((overlaps == best) & (best > 0)).any(-1)
    return torch.where(chosen, overlaps.argmax(-1), found)


def of_found(values: Tensor, found: Int[Tensor, "*#B N"], otherwise: float) -> Tensor:
    """values (B, M, ...) of the object that each box answers for, and `otherwise` where it is none: (*B, N, ...).

    There may be no object at all, M = 0.
    """
    none = values.new_full((len(values), 1, *values.shape[2:]), otherwise)
    index = found.where(found >= 0, values.shape[1])
    return torch.cat([values, none], 1)[torch.arange(len(values), device=values.device)[:, None], index]


def sample(
    positive: Bool[Tensor, "B N"], negative: Bool[Tensor, "B N"], count: int, share: float
) -> Bool[Tensor, "B N"]:
    """At most `count` of each row at random, of which at most a `share` positive and the others negative."""
    noise = torch.rand(positive.shape, device=positive.device)

    def draw(among: Tensor, most: Tensor | int) -> Tensor:
        rank = noise.masked_fill(~among, 2.0).argsort(-1).argsort(-1)
        return among & (rank < most)

    chosen = draw(positive, int(count * share))
    return chosen | draw(negative, count - chosen.sum(-1, keepdim=True))


def nms(
    boxes: Float[Tensor, "N 4"],
    scores: Float[Tensor, "N"],
    threshold: float = 0.5,
    groups: Int[Tensor, "N"] | None = None,
) -> Bool[Tensor, "N"]:
    """Greedy non-maximum suppression: which boxes, given by their corners, are kept.

    From the highest score down, a kept box removes those after it that overlap it by more than the threshold, in its
    own group if there are groups (a class of an image): they are all judged in one pass.
    """
    order = scores.argsort(descending=True, stable=True)
    group = torch.zeros_like(order) if groups is None else groups[order]
    group, by_group = group.sort(stable=True)
    order = order[by_group]
    waiting = at_least_float32(boxes)[order].mT.contiguous()
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    count = group.unique_consecutive(return_counts=True)[1]
    most = int(count.max()) if len(count) else 0
    if len(count) * most**2 <= len(order) * _BLOCK:  # groups side by side compare no more pairs than blocks do
        row = torch.arange(len(count), device=order.device).repeat_interleave(count)
        column = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[row]
        beside = waiting.new_zeros(4, len(count), most)
        beside[:, row, column] = waiting
        name = order.new_zeros(len(count), most)
        kept[order] = _greedy(_covers(beside, name, beside, name, threshold).triu_(1))[row, column]
        return kept
    while len(order):
        head, name = waiting[:, :_BLOCK], group[:_BLOCK]
        alive = _greedy(_covers(head, name, head, name, threshold).triu(1))
        kept[order[:_BLOCK][alive]] = True
        end = _BLOCK + int((group[_BLOCK:] == name[-1]).sum())  # no group before the block's last goes on after it
        last = alive & (name == name[-1])
        covered = _covers(head[:, last], name[last], waiting[:, _BLOCK:end], group[_BLOCK:end], threshold).any(0)
        clear = torch.cat([~covered, covered.new_ones(len(order[end:]))])
        waiting, group, order = waiting[:, _BLOCK:][:, clear], group[_BLOCK:][clear], order[_BLOCK:][clear]
    return kept


def suppress(found: Detections, threshold: float = 0.5) -> Detections:
    """Detections (cx, cy, w, h) after `nms` in each class of each image, all at once; what is removed scores 0."""
    order = found.scores.argsort(dim=-1, descending=True, stable=True)
    boxes = corners(found.boxes).gather(1, order[..., None].expand(-1, -1, 4)).unbind(-1)
    labels = found.labels.gather(1, order)
    kept = _greedy(_covers(boxes, labels, boxes, labels, threshold).triu(1))
    return found._replace(scores=found.scores.where(torch.zeros_like(kept).scatter(1, order, kept), 0.0))


def gather(
    scores: Float[Tensor, "N"],
    labels: Int[Tensor, "N"],
    boxes: Float[Tensor, "N 4"],
    image: Int[Tensor, "N"],
    *,
    images: int,
    most: int,
) -> Detections:
    """Loose detections as rows of `images`: the `most` highest scores of each, in falling order, the rest 0."""
    order = scores.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    count = torch.bincount(image, minlength=images)
    rank = torch.arange(len(order), device=image.device) - (count.cumsum(0) - count)[image[order]]
    order, rank = order[rank < most], rank[rank < most]
    row = image[order]
    found = Detections(scores.new_zeros(images, most), labels.new_zeros(images, most), boxes.new_zeros(images, most, 4))
    for empty, full in zip(found, (scores, labels, boxes), strict=True):
        empty[row, rank] = full[order]
    return found


def _greedy(covers: Bool[Tensor, "*B N N"]) -> Bool[Tensor, "*B N"]:
    """Who is kept when i removes j > i where covers[i, j] and i is kept.

    The k-th link of a chain of removals is settled by the k-th round, so the longest chain counts the rounds. In each a
    product counts the kept boxes that cover a box.
    """
    kept, weight = covers.new_ones(covers.shape[:-1]), covers.float()
    while True:  # a sum of zeros and ones is 0 in any precision only where all are
        after = (kept[..., None, :].float() @ weight).squeeze(-2) == 0
        if torch.equal(after, kept):
            return kept
        kept = after


def _covers(
    a: Sequence[Tensor] | Tensor, name: Tensor, b: Sequence[Tensor] | Tensor, other: Tensor, threshold: float
) -> Bool[Tensor, "*B N M"]:
    """Whether IoU exceeds the threshold, and groups are the same, of all pairs of N and M boxes.

    Boxes are four tensors, x0, y0, x1 and y1: long rows of one coordinate are quicker than many rows of four.
    """
    x0, y0, x1, y1 = (t[..., :, None] for t in a)
    u0, v0, u1, v1 = (t[..., None, :] for t in b)
    inside = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)
    inside.mul_(torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0))
    union = ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0)).sub_(inside).clamp_(min=_TINY)
    return (inside.div_(union) > threshold).logical_and_(name[..., :, None] == other[..., None, :])


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The areas of intersection, union and hull."""
    a, b = at_least_float32(a), at_least_float32(b)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inside = _area((high - low).clamp(min=0))
    union = area(a) + area(b) - inside
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    return inside, union, _area(high - low)


def _area(sides: Float[Tensor, "*B 2"]) -> Float[Tensor, "*B"]:
    """Their product, whose gradient is quicker than that of `prod`."""
    wide, high = sides.unbind(-1)
    return wide * high
