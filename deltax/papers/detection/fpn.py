"""Feature Pyramid Networks for Object Detection. Lin, Dollár, Girshick, He, Hariharan, Belongie, 2016. arXiv:1612.03144

Faster R-CNN, but on a pyramid of maps: from the top down, each level is added to the finer one below it.

A deep network has maps of every size already, but the fine ones know little of what they show. Going back down with
nothing but upsampling, a 1 x 1 convolution and a sum, every level comes to know what the top knows. One head serves all
levels; small objects are sought on fine maps and large ones on coarse, so each level needs one scale of anchors.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.papers.detection.fast_r_cnn import RoIPool, fast_r_cnn
from deltax.papers.detection.faster_r_cnn import faster_r_cnn
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.boxes import corners, iou
from deltax.parts.detector import Anchors
from deltax.parts.precision import at_least_float32
from deltax.parts.regions import Regions
from deltax.shapes import Images, Maps
from deltax.tasks.scenes import Scenes


def top_down(above: Maps, lateral: Maps) -> Maps:
    """The coarser level, each cell repeated, plus what the finer one has to add (Figure 3)."""
    return nn.functional.interpolate(above, size=lateral.shape[-2:], mode="nearest") + lateral


class Subsample(nn.Module):
    """One more level for large anchors: every second cell of the last (section 4.1). A list of one map."""

    steps = (2,)  # how much coarser each level is than the one before

    def __init__(self, deepest: int, dim: int):
        super().__init__()

    def forward(self, deepest: Maps, last: Maps) -> list[Maps]:
        return [last[..., ::2, ::2]]


class Pyramid(nn.Module):
    """The backbone's maps from stage `first` on -> as many of width `dim`, finest first, and those of the `top`.

    Lateral 1 x 1 convolutions, sums on the way down, a 3 x 3 convolution of each sum; nothing between them is bent.
    """

    can_be_zero = ("first",)

    def __init__(
        self, channels: int, *, backbone: Part, dim: int = 32, first: int = 1,
        merge: Part = part(top_down), top: Part = part(Subsample),
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone(channels)
        widths = self.backbone.widths[first:]
        self.lateral = nn.ModuleList([nn.Conv2d(width, dim, 1) for width in widths])
        self.smooth = nn.ModuleList([nn.Conv2d(dim, dim, 3, padding=1) for _ in widths])
        self.merge, self.top = merge, top(widths[-1], dim)
        self.width, self.first = dim, first
        strides = list(self.backbone.strides[first:])
        for step in self.top.steps:
            strides.append(strides[-1] * step)
        self.strides = tuple(strides)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (*self.lateral, *self.smooth):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Images) -> list[Maps]:
        maps = list(self.backbone.each(images))[self.first :]
        *rest, x = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        merged = [x]
        for lateral in reversed(rest):
            x = self.merge(x, lateral)
            merged.insert(0, x)
        levels = [smooth(m) for smooth, m in zip(self.smooth, merged, strict=True)]
        return [*levels, *self.top(maps[-1], levels[-1])]


def level_of(boxes: Float[Tensor, "N 4"], *, home: float, side: float, levels: int) -> Tensor:
    """Which of `levels` maps a box of corners belongs to: `home`, counted from the finest, for one of area side^2, and
    one level down for half the side (Eq. 1)."""
    sides = (at_least_float32(boxes[:, 2:]) - at_least_float32(boxes[:, :2])).clamp(min=0)
    return (home + (sides.prod(-1).sqrt() / side + 1e-9).log2()).floor().clamp(0, levels - 1).long()


class ByLevel(nn.Module):
    """Each region is cut from the level that its size asks for, as `inner` does from one map. Maps beyond `levels` are
    for proposals only. Maps, images, N regions, strides -> (N, C, P, P)."""

    def __init__(self, width: int, *, inner: Part, levels: int = 2, home: float = 1.0, side: float = 14.0):
        super().__init__()
        self.inner = inner(width)
        self.width, self.levels, self.home, self.side = self.inner.width, levels, home, side

    def forward(
        self, maps: list[Maps], images: Images, regions: Regions, strides: tuple[int, ...] = ()
    ) -> Float[Tensor, "N _ P P"]:
        level = level_of(regions.boxes, home=self.home, side=self.side, levels=self.levels)
        pieces, places = [], []
        for k, shared in enumerate(maps[: self.levels]):
            here = (level == k).nonzero()[:, 0]
            mine = Regions(regions.boxes[here], regions.image[here])
            pieces.append(self.inner([shared], images, mine, strides[k : k + 1]))
            places.append(here)
        return torch.cat(pieces)[torch.cat(places).argsort()]


@paper(on=faster_r_cnn, replaces=fast_r_cnn, year=2016, arxiv="1612.03144", whole="r-cnn+fast-r-cnn+faster-r-cnn")
def fpn(recipe: Part, *, dim: int = 32) -> Part:
    recipe = recipe.fill("maps", Pyramid, dim=dim).wrap("regions", ByLevel)
    return recipe.set(Anchors, sides=((9.0,), (13.0,), (18.0,)))


@claim
def half_the_side_is_a_level_down():
    """On P2 to P5, a box of 224 x 224 goes to P4, any other box of that area too, each halving of the side one level
    down, and what has no level to the nearest (Eq. 1)."""
    sizes = torch.tensor([[224.0, 224], [448, 112], [223, 223], [112, 112], [56, 56], [1, 1], [448, 448], [9000, 9000]])
    boxes = torch.cat([torch.full_like(sizes, 3.0), sizes + 3], -1).double()
    level = level_of(boxes, home=2, side=224.0, levels=4) + 2
    assert level.tolist() == [4, 4, 3, 3, 2, 2, 5, 5]


@claim
def each_region_from_its_own_level():
    """Regions of mixed sizes come back in their order, each as if it had been alone."""
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    maps = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in (16, 8, 4)]
    corner, size = torch.rand(20, 2, dtype=torch.float64) * 12, 2 + torch.rand(20, 2, dtype=torch.float64) * 20
    regions = Regions(torch.cat([corner, corner + size], -1), torch.randint(0, 2, (20,)))
    cut = ByLevel(3, inner=part(RoIPool, bins=3))
    together = cut(maps, images, regions)
    for i in range(20):
        alone = cut(maps, images, Regions(*(t[i : i + 1] for t in regions)))
        assert torch.equal(together[i : i + 1], alone)
    assert len(level_of(regions.boxes, home=1.0, side=14.0, levels=2).unique()) == 2


@claim
def what_is_seen_above_comes_down():
    """The finest level has a gradient in the lateral convolution of the coarsest; with nothing brought down it has
    none, and is what it would be if that convolution gave zero."""
    torch.manual_seed(0)
    image = torch.randn(2, 1, 21, 17, dtype=torch.float64)
    build = lambda merge: Pyramid(1, backbone=r_cnn["model.regions.backbone"], dim=5, merge=merge).double().eval()
    pyramid, alone = build(part(top_down)), build(part(lateral_only))
    alone.load_state_dict(pyramid.state_dict())
    for model in (pyramid, alone):
        reached = torch.autograd.grad(model(image)[0].sum(), model.lateral[-1].weight, allow_unused=True)[0]
        assert (reached is not None) == (model is pyramid)
    for parameter in pyramid.lateral[-1].parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(pyramid(image)[0], alone(image)[0])


@claim.measured(paper="AR on small objects 44.9 with, 30.8 without top-down enrichment (Table 1)")
def top_down_helps_small_objects(lab):
    """Where digits come in three sizes, 8, 16 and 32 pixels high, a pyramid finds 5 points more of the smallest, with
    their class and an IoU of 0.5, than the same with lateral connections alone."""
    task = part(Scenes, size=64, classes=4, held_out=128, sides=(8, 16, 32))
    tree = (r_cnn + fast_r_cnn + faster_r_cnn + fpn).put("task", task).set(Anchors, sides=((8.0,), (15.0,), (29.0,)))
    gains = []
    for seed in lab.seeds(3):
        found = [_found(lab.train(recipe, seed=seed), 8) for recipe in (tree, tree.fill("merge", lateral_only))]
        gains.append(found[0] - found[1])
    return lab.at_least(gains, 0.05, unit="recall")


def lateral_only(above: Maps, lateral: Maps) -> Maps:
    """Nothing comes down: the pyramid of Table 1 (d)."""
    return lateral


@torch.inference_mode()
def _found(run, height: int) -> float:
    """The share of held-out objects up to `height` pixels high that are found with their class and an IoU of 0.5."""
    hit, count = 0, 0
    for batch in run.task.held_out_batches(32):
        found = run.model.detect(batch.images)
        small = (batch.labels >= 0) & (batch.boxes[..., 3] * batch.images.shape[-2] <= height + 0.5)
        right = (batch.labels[..., None] == found.labels[:, None]) & (found.scores[:, None] > 0)
        overlaps = iou(corners(batch.boxes)[:, :, None], corners(found.boxes)[:, None])
        hit += int(((overlaps >= 0.5) & right).any(-1)[small].sum())
        count += int(small.sum())
    return hit / count
