"""Feature Pyramid Networks for Object Detection. Lin, Dollár, Girshick, He, Hariharan, Belongie, 2016. arXiv:1612.03144

Faster R-CNN, but on a pyramid of maps: from the top down, each level is added to the finer one below it.

A deep network has maps of every size already, but the fine ones know little of what they show. Going back down with
nothing but upsampling, a 1 x 1 convolution and a sum, every level comes to know what the top knows. One head serves all
levels; small objects are sought on fine maps and large ones on coarse, so each level needs one scale of anchors.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.papers.detection.fast_r_cnn import fast_r_cnn
from deltax.papers.detection.faster_r_cnn import faster_r_cnn
from deltax.parts.detection.detector import Anchors
from deltax.parts.detection.regions import Regions
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps


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
