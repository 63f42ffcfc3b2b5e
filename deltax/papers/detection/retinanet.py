"""Focal Loss for Dense Object Detection. Lin, Goyal, Girshick, He, Dollár, 2017. arXiv:1708.02002

A feature pyramid network, but one-stage: every anchor is classified directly, with a loss that down-weights easy
examples.

A second stage trains on a balanced sample of regions; a one-stage detector trains on thousands of anchors, nearly all
easy background, whose summed losses exceed those of the few objects. Focal loss multiplies cross-entropy by (1 -
p_t)^gamma, so well-classified anchors have almost no loss. The last bias starts at a prior probability of 0.01;
otherwise background dominates the first steps. The paper keeps the best 1000 anchors of each level; `detect` keeps the
best 200 over all levels.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_ANCHORS, needs
from deltax.papers.detection.fpn import Pyramid, fpn
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.detection.boxes import IGNORED, Detections, assign, decode, encode, iou, of_found
from deltax.parts.detection.detector import Anchors, by_cell, detections, grids, truth
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps, PerExample


class Dense(NamedTuple):
    """Class logits and box offsets of S anchors; anchors (S, 4) are corners in pixels."""

    logits: Float[Tensor, "B S V"]
    offsets: Float[Tensor, "B S 4"]
    anchors: Float[Tensor, "S 4"]


class TopConvolutions(nn.Module):
    """P6 and P7: a 3 x 3 convolution of stride 2 of the backbone's last map, and another of its relu."""

    steps = (2, 2)

    def __init__(self, deepest: int, dim: int):
        super().__init__()
        self.first = nn.Conv2d(deepest, dim, 3, stride=2, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, deepest: Maps, last: Maps) -> list[Maps]:
        # P6: 3 x 3, stride 2, on C5; P7: the same on relu(P6)
        x = self.first(deepest)
        return [x, self.second(torch.relu(x))]


class DenseHead(nn.Module):
    """Two towers of 3 x 3 convolutions, for classes and for boxes, shared over levels (section 4).

    Maps -> logits (B, S, V), initially at probability `prior`, and class-agnostic offsets (B, S, 4).
    """

    can_be_zero = ("depth",)

    def __init__(self, width: int, classes: int, anchors: int, *, depth: int = 2, prior: float = 0.01):
        super().__init__()
        layer = lambda out: nn.Conv2d(width, out, 3, padding=1)
        self.class_tower, self.box_tower = (nn.ModuleList([layer(width) for _ in range(depth)]) for _ in range(2))
        self.classes, self.offsets = layer(classes * anchors), layer(4 * anchors)
        self.classes_count, self.prior = classes, prior
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        # section 4.1: b = -log((1 - pi) / pi)
        nn.init.constant_(self.classes.bias, math.log(self.prior / (1 - self.prior)))

    def forward(self, maps: list[Maps]) -> tuple[Float[Tensor, "B S V"], Float[Tensor, "B S 4"]]:
        logits, offsets = [], []
        for x in maps:
            says, moves = x, x
            for of_class, of_box in zip(self.class_tower, self.box_tower, strict=True):
                says, moves = torch.relu(of_class(says)), torch.relu(of_box(moves))
            # (B, cells * anchors, V)
            logits.append(by_cell(self.classes(says), self.classes_count))
            offsets.append(by_cell(self.offsets(moves), 4))
        return torch.cat(logits, 1), torch.cat(offsets, 1)


class OneStage(nn.Module):
    """Images -> maps -> `Dense` predictions of every anchor. The task gives `channels` and `classes`."""

    interface = IMAGES_TO_ANCHORS

    def __init__(
        self, channels: int, classes: int, *, maps: Part, anchors: Part, dense_head: Part = part(DenseHead)
    ):  # fmt: skip
        super().__init__()
        self.maps, self.anchors = maps(channels), anchors()
        self.dense_head = dense_head(self.maps.width, classes, self.anchors.count)

    def forward(self, images: Images) -> Dense:
        maps = self.maps(images)
        anchors = torch.cat(self.anchors(grids(maps, images, self.maps.strides), images.device))
        return Dense(*self.dense_head(maps), anchors)

    def detect(
        self, images: Images, *, least: float = 0.05, overlap: float = 0.5, before: int = 200, most: int = 20
    ) -> Detections:
        """The `before` most probable boxes of each image above `least`, after NMS."""
        said = self(images)
        # over (anchor, class) pairs: the index is anchor * V + class
        odds, index = at_least_float32(said.logits).sigmoid().flatten(1).topk(min(before, said.logits[0].numel()))
        image, rank = (odds > least).nonzero(as_tuple=True)
        anchor, label = (f(index[image, rank], said.logits.shape[-1]) for f in (torch.floor_divide, torch.remainder))
        boxes = decode(said.offsets[image, anchor], said.anchors[anchor])
        return detections(odds[image, rank], label, boxes, image, images, overlap=overlap, most=most)


@needs("images", "boxes", "labels", model=IMAGES_TO_ANCHORS)
def one_stage(model: nn.Module, batch: Any, *, gamma: float = 2.0, alpha: float = 0.25) -> PerExample:
    """Focal loss of every anchor and class plus smooth L1 of positive anchors' offsets, for each image (section 4).

    Divided by the number of positive anchors, at least 1. IoU of 0.5 or more is positive, below 0.4 background.
    """
    boxes, real = truth(batch, batch.images)
    said = model(batch.images)
    # index of the object, or background, or ignored
    found = assign(iou(said.anchors[:, None], boxes[:, None]), real, low=0.4, high=0.5)
    mine = found >= 0
    logits, offsets = at_least_float32(said.logits), at_least_float32(said.offsets)
    label = of_found(batch.labels, found, 0)
    targets = nn.functional.one_hot(label, logits.shape[-1]) * mine[..., None]
    # anchors between 0.4 and 0.5 are ignored
    each = focal(logits, targets.to(logits.dtype), gamma=gamma, alpha=alpha).sum(-1).where(found != IGNORED, 0.0)
    goal = encode(of_found(boxes, found, 0.0), said.anchors).to(offsets.dtype)
    # class-agnostic, positive anchors only
    error = nn.functional.smooth_l1_loss(offsets, goal, reduction="none").sum(-1).where(mine, 0.0)
    return (each + error).sum(1) / mine.sum(1).clamp(min=1)


@paper(on=fpn, year=2017, arxiv="1708.02002")
def retinanet(*, dim: int = 32, width: int = 8) -> Part:
    backbone = part(r_cnn["model.regions.backbone"], widths=(width, 2 * width, 4 * width))
    # anchor sides in pixels, two per level
    sizes = (8.0, 11.0), (12.0, 15.0), (16.0, 20.0), (24.0, 30.0)
    model = part(
        OneStage,
        maps=part(Pyramid, backbone=backbone, dim=dim, top=TopConvolutions),
        anchors=part(Anchors, sides=sizes),
    )
    return r_cnn.put("model", model).put("objective", part(one_stage)).put("loop.steps", 600)


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log p_t, elementwise, for targets 0 and 1 (Eq. 5).

    `alpha` is the weight of target 1, 1 - alpha that of target 0; a negative alpha gives both weight 1.
    """
    sign = 2 * targets - 1
    # 1 - p_t = sigmoid(-sign z), log p_t = logsigmoid(sign z): finite for any logit
    loss = -(torch.sigmoid(-sign * logits) ** gamma) * nn.functional.logsigmoid(sign * logits)
    return loss if alpha < 0 else loss * (targets * alpha + (1 - targets) * (1 - alpha))
