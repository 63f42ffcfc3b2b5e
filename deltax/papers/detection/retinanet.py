"""Focal Loss for Dense Object Detection. Lin, Goyal, Girshick, He, Dollár, 2017. arXiv:1708.02002

A feature pyramid network, but in one stage: each anchor is classified, by a loss that fades out what is easy.

A second stage sees a balanced handful of regions; a first stage sees thousands of anchors, nearly all of them
background and nearly all of those easy. Together their small losses drown the few objects. Focal loss multiplies
cross-entropy by (1 - p)^gamma, so that what is known already weighs nothing, and the last bias starts at a prior of one
object in a hundred, or the first steps would be spent on the background alone. The paper detects with the best 1000
anchors of each level; `detect` takes the best 200 answers of all levels together.
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


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, elementwise, of targets 0 and 1 (Eq. 5).

    `alpha` weighs the ones and 1 - alpha the zeros; a negative alpha weighs both by 1.
    """
    sign = 2 * targets - 1
    loss = -(torch.sigmoid(-sign * logits) ** gamma) * nn.functional.logsigmoid(sign * logits)
    return loss if alpha < 0 else loss * (targets * alpha + (1 - targets) * (1 - alpha))


class Dense(NamedTuple):
    """Of S anchors (S, 4), corners in pixels: a logit for each class, and offsets."""

    logits: Float[Tensor, "B S V"]
    offsets: Float[Tensor, "B S 4"]
    anchors: Float[Tensor, "S 4"]


class TopConvolutions(nn.Module):
    """Two more levels: a 3 x 3 convolution of stride 2 of the backbone's last map, and another of that one's relu."""

    steps = (2, 2)

    def __init__(self, deepest: int, dim: int):
        super().__init__()
        self.first = nn.Conv2d(deepest, dim, 3, stride=2, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, deepest: Maps, last: Maps) -> list[Maps]:
        x = self.first(deepest)
        return [x, self.second(torch.relu(x))]


class DenseHead(nn.Module):
    """Two towers of 3 x 3 convolutions, for classes and for boxes, the same on all levels (section 4).

    Maps -> logits (B, S, V) that begin at a probability of `prior`, and offsets (B, S, 4), the same for all classes.
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
        nn.init.constant_(self.classes.bias, math.log(self.prior / (1 - self.prior)))

    def forward(self, maps: list[Maps]) -> tuple[Float[Tensor, "B S V"], Float[Tensor, "B S 4"]]:
        logits, offsets = [], []
        for x in maps:
            says, moves = x, x
            for of_class, of_box in zip(self.class_tower, self.box_tower, strict=True):
                says, moves = torch.relu(of_class(says)), torch.relu(of_box(moves))
            logits.append(by_cell(self.classes(says), self.classes_count))
            offsets.append(by_cell(self.offsets(moves), 4))
        return torch.cat(logits, 1), torch.cat(offsets, 1)


class OneStage(nn.Module):
    """Images -> maps -> what is said of every anchor, a `Dense`. `channels` and `classes` are the task's."""

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
        """Boxes of a probability of at least `least`, the `before` likeliest of each image, after suppression."""
        said = self(images)
        odds, index = at_least_float32(said.logits).sigmoid().flatten(1).topk(min(before, said.logits[0].numel()))
        image, rank = (odds > least).nonzero(as_tuple=True)
        anchor, label = (f(index[image, rank], said.logits.shape[-1]) for f in (torch.floor_divide, torch.remainder))
        boxes = decode(said.offsets[image, anchor], said.anchors[anchor])
        return detections(odds[image, rank], label, boxes, image, images, overlap=overlap, most=most)


@needs("images", "boxes", "labels", model=IMAGES_TO_ANCHORS)
def one_stage(model: nn.Module, batch: Any, *, gamma: float = 2.0, alpha: float = 0.25) -> PerExample:
    """Focal loss of every anchor and class and smooth L1 of objects' offsets, over the anchors that are an object's,
    at least 1: those of IoU 0.5 on, where below 0.4 is background (section 4). One for each image."""
    boxes, real = truth(batch, batch.images)
    said = model(batch.images)
    found = assign(iou(said.anchors[:, None], boxes[:, None]), real, low=0.4, high=0.5)
    mine = found >= 0
    logits, offsets = at_least_float32(said.logits), at_least_float32(said.offsets)
    label = of_found(batch.labels, found, 0)
    targets = nn.functional.one_hot(label, logits.shape[-1]) * mine[..., None]
    each = focal(logits, targets.to(logits.dtype), gamma=gamma, alpha=alpha).sum(-1).where(found != IGNORED, 0.0)
    goal = encode(of_found(boxes, found, 0.0), said.anchors).to(offsets.dtype)
    error = nn.functional.smooth_l1_loss(offsets, goal, reduction="none").sum(-1).where(mine, 0.0)
    return (each + error).sum(1) / mine.sum(1).clamp(min=1)


@paper(on=fpn, year=2017, arxiv="1708.02002")
def retinanet(*, dim: int = 32, width: int = 8) -> Part:
    backbone = part(r_cnn["model.regions.backbone"], widths=(width, 2 * width, 4 * width))
    sizes = (8.0, 11.0), (12.0, 15.0), (16.0, 20.0), (24.0, 30.0)
    model = part(
        OneStage,
        maps=part(Pyramid, backbone=backbone, dim=dim, top=TopConvolutions),
        anchors=part(Anchors, sides=sizes),
    )
    return r_cnn.put("model", model).put("objective", part(one_stage)).put("loop.steps", 600)
