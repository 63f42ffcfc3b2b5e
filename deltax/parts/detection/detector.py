"""What detectors that classify regions share: proposals, a sample of them to learn from, and what is said of each.

Inside, boxes are corners in pixels; a task's boxes, and what `detect` gives, are (cx, cy, w, h) with the image as 1.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from deltax.contract import IMAGES_TO_REGIONS, needs
from deltax.errors import UserError
from deltax.parts.detection.boxes import (
    Detections,
    anchor_grid,
    assign,
    centred,
    clip,
    corners,
    decode,
    encode,
    gather,
    iou,
    nms,
    sample,
)  # fmt: skip
from deltax.parts.detection.regions import Regions, stride_of
from deltax.parts.numerics.precision import at_least_float32
from deltax.recipe import Part
from deltax.shapes import Images, Maps, PerExample

SPREAD = (0.1, 0.1, 0.2, 0.2)  # of regions' offsets, as released code takes it; losses see them at unit variance


class Proposals(NamedTuple):
    """Boxes to look at, (B, N, 4) corners in pixels, which of them are real, and what their source has said."""

    boxes: Float[Tensor, "B N 4"]
    real: Bool[Tensor, "B N"]
    said: Any = None


class Said(NamedTuple):
    """What is said of each of R regions: class logits, background last, and for each class offsets of its box.

    `found` is the object that each region answers for, or NOTHING; None when the truth was not told.
    """

    proposals: Proposals
    regions: Regions
    logits: Float[Tensor, "R V"]
    offsets: Float[Tensor, "R V 4"]
    found: Int[Tensor, "R"] | None = None


class Anchors(nn.Module):
    """Boxes centred on every cell of each map: `sides` (root of the area, pixels) by level, and height over width.

    Grids of (rows, columns, stride) -> one (S, 4) of corners for each. Raises UserError for another number of levels.
    """

    def __init__(self, *, sides: tuple[tuple[float, ...], ...] = ((9.0, 13.0),), ratios: tuple[float, ...] = (1.4,)):
        super().__init__()
        if len({len(level) for level in sides}) != 1:
            raise UserError(f"heads are shared, so each level has as many sides as the others, unlike {sides}")
        self.sides, self.ratios = sides, ratios
        self.count = len(sides[0]) * len(ratios)  # at each cell

    def forward(self, grids: list[tuple[int, int, int]], device: torch.device | None = None) -> list[Tensor]:
        if len(grids) != len(self.sides):
            raise UserError(f"there are {len(grids)} maps and anchors for {len(self.sides)}: give sides for each map")
        return [
            anchor_grid(*grid, sides=sides, ratios=self.ratios, device=device)
            for grid, sides in zip(grids, self.sides, strict=True)
        ]


class Windows(nn.Module):
    """The same boxes for every image: anchors every `stride` pixels, whatever the maps show. It does not learn."""

    def __init__(self, width: int, *, anchors: Part, stride: int = 4):
        super().__init__()
        self.stride, self.anchors = stride, anchors()

    def forward(self, maps: list[Maps], images: Images, strides: tuple[int, ...] = ()) -> Proposals:
        rows, columns = images.shape[-2:]
        [boxes] = self.anchors([(-(-rows // self.stride), -(-columns // self.stride), self.stride)], images.device)
        boxes = clip(boxes, rows, columns).expand(len(images), -1, -1)
        return Proposals(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool, device=images.device))

    def loss(self, proposals: Proposals, boxes: Tensor, real: Tensor) -> PerExample:
        return proposals.boxes.new_zeros(len(boxes))


class RegionDetector(nn.Module):
    """Images -> maps -> proposals -> features of each region -> `Said`. `channels` and `classes` are the task's.

    Learning, each image gives `count` regions, at most a quarter of them objects, where a region is an object's from
    IoU 0.5 on; objects' own boxes are proposals too.
    """

    interface = IMAGES_TO_REGIONS

    def __init__(
        self, channels: int, classes: int, *, maps: Part, proposals: Part, regions: Part, region_head: Part,
        count: int = 32,
    ):  # fmt: skip
        super().__init__()
        self.maps = maps(channels)
        self.proposals = proposals(self.maps.width)
        self.regions = regions(self.maps.width)
        self.region_head = region_head(self.regions.width, classes)
        self.count = count

    def forward(self, images: Images, boxes: Tensor | None = None, real: Tensor | None = None) -> Said:
        """Told the truth, (B, M, 4) corners in pixels and which are real, it speaks of a sample of the proposals."""
        maps = self.maps(images)
        proposals = self.proposals(maps, images, self.maps.strides)
        if boxes is None or real is None:
            regions, found = Regions(proposals.boxes[proposals.real], proposals.real.nonzero()[:, 0]), None
        else:
            regions, found = self._sample(proposals, boxes, real)
        features = self.regions(maps, images, regions, self.maps.strides)
        return Said(proposals, regions, *self.region_head(features), found)

    @torch.no_grad()
    def _sample(self, proposals: Proposals, boxes: Tensor, real: Tensor) -> tuple[Regions, Tensor]:
        every = torch.cat([proposals.boxes, boxes], 1)
        exists = torch.cat([proposals.real, real], 1)
        found = assign(iou(every[:, :, None], boxes[:, None]), real, low=0.5, high=0.5)
        chosen = sample(exists & (found >= 0), exists & (found < 0), self.count, 0.25)
        return Regions(every[chosen], chosen.nonzero()[:, 0]), found[chosen]

    def detect(self, images: Images, *, least: float = 0.05, overlap: float = 0.3, most: int = 20) -> Detections:
        """Each class's boxes of a probability of at least `least`, after suppression. Images -> (B, most) each."""
        said = self(images)
        probability = at_least_float32(said.logits).softmax(-1)[:, :-1]
        row, label = (probability > least).nonzero(as_tuple=True)
        offsets = at_least_float32(said.offsets[row, label])
        offsets = offsets * offsets.new_tensor(SPREAD)
        return detections(
            probability[row, label], label, decode(offsets, said.regions.boxes[row]), said.regions.image[row],
            images, overlap=overlap, most=most,
        )  # fmt: skip


def detections(
    scores: Tensor, labels: Tensor, boxes: Tensor, image: Tensor, images: Images, *, overlap: float, most: int
) -> Detections:
    """Loose boxes, corners in pixels, clipped, suppressed within each class of each image, and gathered by image."""
    rows, columns = images.shape[-2:]
    boxes = clip(boxes, rows, columns)
    kept = nms(boxes, scores, overlap, image * (int(labels.max()) + 1 if len(labels) else 1) + labels)
    boxes = centred(boxes) / boxes.new_tensor([columns, rows, columns, rows])
    return gather(scores[kept], labels[kept], boxes[kept], image[kept], images=len(images), most=most)


def truth(batch: Any, images: Images) -> tuple[Float[Tensor, "B M 4"], Bool[Tensor, "B M"]]:
    """The boxes of a batch as corners in pixels, and which of them are real."""
    rows, columns = images.shape[-2:]
    boxes = corners(batch.boxes)
    return boxes * boxes.new_tensor([columns, rows, columns, rows]), batch.labels >= 0


@needs("images", "boxes", "labels", model=IMAGES_TO_REGIONS)
def region_loss(model: nn.Module, batch: Any) -> PerExample:
    """Cross-entropy of each region's class, smooth L1 of an object's offsets, both a mean over the regions of an image,
    and whatever the source of the proposals is to learn."""
    boxes, real = truth(batch, batch.images)
    said = model(batch.images, boxes, real)
    image, found = said.regions.image, said.found
    logits, mine = at_least_float32(said.logits), found >= 0
    label = torch.full_like(found, logits.shape[-1] - 1)
    label[mine] = batch.labels[image[mine], found[mine]]
    each = nn.functional.cross_entropy(logits, label, reduction="none")
    goal = encode(boxes[image[mine], found[mine]], said.regions.boxes[mine]) / boxes.new_tensor(SPREAD)
    offsets = at_least_float32(said.offsets[mine, label[mine]])
    error = nn.functional.smooth_l1_loss(offsets, goal.to(offsets.dtype), reduction="none").sum(-1)
    each = each.index_add(0, mine.nonzero()[:, 0], error.to(each.dtype))
    count = torch.bincount(image, minlength=len(boxes)).clamp(min=1)
    return each.new_zeros(len(boxes)).index_add(0, image, each) / count + model.proposals.loss(
        said.proposals, boxes, real
    )


def grids(maps: list[Maps], images: Images, strides: tuple[int, ...] = ()) -> list[tuple[int, int, int]]:
    """Rows, columns and stride of each map. Without the network's own strides, they are those that the sizes leave."""
    strides = strides or tuple(stride_of(images, m) for m in maps)
    return [(*m.shape[-2:], stride) for m, stride in zip(maps, strides, strict=True)]


def by_cell(said: Float[Tensor, "B K Y X"], width: int) -> Float[Tensor, "B S V"]:
    """What a convolution says of the anchors of each cell, `width` numbers an anchor, in the order of `Anchors`."""
    return said.permute(0, 2, 3, 1).reshape(len(said), -1, width)
