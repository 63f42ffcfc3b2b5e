"""Feature Pyramid Networks for Object Detection. Lin, Dollár, Girshick, He, Hariharan, Belongie, 2016. arXiv:1612.03144

Faster R-CNN, but on a feature pyramid: from the top down, each level is added to the next finer one.

A deep network has maps of every size, but its fine maps have weak semantics. Upsampling, a 1 x 1 convolution and a sum
bring the features of the deepest map to every level. One head is shared by all levels; small objects are detected on
fine maps and large ones on coarse maps, so each level needs one anchor scale.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.papers.detection.fast_r_cnn import fast_r_cnn
from deltax.papers.detection.faster_r_cnn import faster_r_cnn
from deltax.papers.vision.backbones.resnet import resnet
from deltax.parts.detection.detector import Anchors
from deltax.parts.detection.regions import Regions
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps


def top_down(above: Maps, lateral: Maps) -> Maps:
    """The coarser level, nearest-upsampled, plus the lateral 1 x 1 convolution of the finer map (Figure 3)."""
    return nn.functional.interpolate(above, size=lateral.shape[-2:], mode="nearest") + lateral


@paper(
    on=(faster_r_cnn, resnet), replaces=fast_r_cnn, year=2016, arxiv="1612.03144", whole="r-cnn+fast-r-cnn+faster-r-cnn"
)
def fpn(recipe: Part, *, dim: int = 32) -> Part:
    # the levels' features, then the level of each region
    recipe = recipe.fill("maps", Pyramid, dim=dim).wrap("regions", ByLevel)
    # one anchor scale per level
    return recipe.set(Anchors, sides=((9.0,), (13.0,), (18.0,)))


class Subsample(nn.Module):
    """One more level for large anchors: every second cell of the last (section 4.1). -> [map]."""

    steps = (2,)  # how much coarser each level is than the one before

    def __init__(self, deepest: int, dim: int):
        super().__init__()

    def forward(self, deepest: Maps, last: Maps) -> list[Maps]:
        return [last[..., ::2, ::2]]


class Pyramid(nn.Module):
    """Backbone maps from stage `first` on -> as many maps of width `dim`, finest first, then those of `top`.

    Lateral 1 x 1 convolutions, sums from the top down, a 3 x 3 convolution of each sum; no nonlinearity between them.
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
            # as in Detectron
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Images) -> list[Maps]:
        maps = list(self.backbone.each(images))[self.first :]
        *rest, x = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        merged = [x]
        for lateral in reversed(rest):
            # top-down: P_l = lateral_l + upsampled P_(l+1)
            x = self.merge(x, lateral)
            merged.insert(0, x)
        # reduces the aliasing of upsampling (section 3)
        levels = [smooth(m) for smooth, m in zip(self.smooth, merged, strict=True)]
        return [*levels, *self.top(maps[-1], levels[-1])]


def level_of(boxes: Float[Tensor, "N 4"], *, home: float, side: float, levels: int) -> Tensor:
    """The level of each box, 0 the finest (Eq. 1): `home` for an area of side^2, one less for half the side."""
    sides = (at_least_float32(boxes[:, 2:]) - at_least_float32(boxes[:, :2])).clamp(min=0)
    # Eq. 1: k = floor(k0 + log2(sqrt(w h) / 224))
    return (home + (sides.prod(-1).sqrt() / side + 1e-9).log2()).floor().clamp(0, levels - 1).long()


class ByLevel(nn.Module):
    """Pools each region from the level of its size, by `inner`. Levels beyond `levels` are for proposals only.

    Maps, images, N regions, strides -> (N, C, P, P).
    """

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
        # back to the order of the regions
        return torch.cat(pieces)[torch.cat(places).argsort()]
