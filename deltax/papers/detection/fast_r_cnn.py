"""Fast R-CNN. Girshick, 2015. arXiv:1504.08083

R-CNN, but the network runs once for each image: every region pools a fixed grid from the map that all share.

Two thousand crops of one image are mostly the same pixels, computed two thousand times. RoI pooling cuts the map
instead of the image, at whole cells, and keeps the largest value of each bin, so that gradients of overlapping regions
meet in the shared network; classes and boxes then learn together, from the same two layers. The paper draws background
from regions of IoU 0.1 on, which mines hard examples; here any region below 0.5 may be drawn.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.attention.scratch import scratch
from deltax.parts.detection.regions import Regions, stride_of
from deltax.parts.model.linear import Linear, XavierLinear
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps


def roi_pool(maps: Images, regions: Regions, *, scale: float, out: int = 7) -> Float[Tensor, "N _ P P"]:
    """The largest value in each of out x out bins of each region (section 2.1).

    Corners are rounded to cells and belong to the region; bins reach from floor to ceil, so neighbours may share a row;
    a bin outside the map is 0. The gradient goes to the first of the largest cells. `scale` is cells a pixel.
    """
    _, channels, rows, columns = maps.shape
    x0, y0, x1, y1 = _rounded(at_least_float32(regions.boxes.detach()) * scale).long().unbind(-1)
    (top, bottom), (left, right) = _bins(y0, y1, rows, out), _bins(x0, x1, columns, out)
    each = lambda of_bin: of_bin.expand(-1, out, out).flatten()
    top, left = each(top[:, :, None]), each(left[:, None])
    high, wide = each(bottom[:, :, None]) - top, each(right[:, None]) - left
    count = high.clamp(min=0) * wide.clamp(min=0)
    cells = torch.cat([maps.permute(0, 2, 3, 1).reshape(-1, channels), maps.new_zeros(1, channels)])
    first = (each(regions.image[:, None, None] * rows) + top) * columns + left
    first = first.where(count > 0, len(cells) - 1)  # the cell of empty bins
    largest = _largest(cells.detach(), first, wide, count, columns)
    pooled = cells.flatten().gather(0, largest.flatten())
    return pooled.view(-1, out, out, channels).permute(0, 3, 1, 2)


def _largest(cells: Tensor, first: Tensor, wide: Tensor, count: Tensor, columns: int) -> Int[Tensor, "B C"]:
    """Of each bin in each channel, where its largest is in `cells.flatten()`.

    cells          (S, C), the maps row by row, each of `columns`
    first, wide    a bin's first cell, and how many there are in a row of it
    count          how many it has; the first is read in any case

    All first cells are read, then all second ones: bins lie by their size, so those that go on are the last of them.
    """
    keys, (count, order) = _keys(cells), count.sort()
    first, wide = first[order], wide[order]
    best = torch.index_select(keys, 0, first, out=scratch("best", (len(first), cells.shape[1]), keys))
    steps = torch.arange(1, max([1, *count[-1:].tolist()]), device=cells.device)
    for step, begin in enumerate(torch.searchsorted(count, steps, right=True).tolist(), 1):
        going = wide[begin:]
        at = first[begin:] + step // going * columns + step % going
        new = torch.index_select(keys, 0, at, out=scratch("new", (len(at), cells.shape[1]), keys))
        torch.minimum(best[begin:], new, out=best[begin:])
    at = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return best.index_select(0, at).bitwise_and_(_PLACE)


_PLACE = 0xFFFFFFFF  # the low bits of a key


def _keys(cells: Tensor) -> Int[Tensor, "S C"]:
    """Whole numbers that order the values of a channel from the largest down, and equal ones by their place.

    Their high 32 bits are those of the value, turned so that they fall as it rises, or its rank where 32 do not hold
    it; the low ones are its place in `cells.flatten()`.
    """
    place = torch.arange(cells.numel(), device=cells.device).view_as(cells)
    if cells.dtype == torch.float64:
        value = cells.unique(return_inverse=True)[1].neg_()
    else:
        bits = (cells.float() + 0.0).view(torch.int32)  # -0 is 0
        value = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_not_().long()
    return value.bitwise_left_shift_(32).bitwise_or_(place)


def _rounded(x: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero, as C rounds."""
    return x.sign() * (x.abs() + 0.5).floor()


def _bins(low: Tensor, high: Tensor, cells: int, out: int) -> tuple[Tensor, Tensor]:
    """First cell and one past the last of each bin of each region, (N, P): whole-number floor and ceil."""
    size, step = (high - low + 1).clamp(min=1)[:, None], torch.arange(out, device=low.device)
    first, last = step * size // out, -(-(step + 1) * size // out)
    return (low[:, None] + first).clamp(0, cells), (low[:, None] + last).clamp(0, cells)


class RoIPool(nn.Module):
    """`roi_pool` of the one map to bins x bins. Maps, images, N regions, strides -> (N, C, P, P)."""

    def __init__(self, width: int, *, bins: int = 5):
        super().__init__()
        self.bins, self.width = bins, width * bins**2

    def forward(
        self, maps: list[Maps], images: Images, regions: Regions, strides: tuple[int, ...] = ()
    ) -> Float[Tensor, "N _ P P"]:
        [shared], [stride] = maps, strides or [stride_of(images, m) for m in maps]
        return roi_pool(shared, regions, scale=1 / stride, out=self.bins)


class SharedMap(nn.Module):
    """The last map of the network, once for each image."""

    def __init__(self, channels: int, *, backbone: Part):
        super().__init__()
        self.backbone = backbone(channels)
        self.width, self.strides = self.backbone.width, self.backbone.strides[-1:]

    def forward(self, images: Images) -> list[Maps]:
        return [self.backbone(images)]


class JointHead(nn.Module):
    """Two layers of features (N, C, P, P), and of these both class logits (N, V + 1) and offsets (N, V, 4)."""

    def __init__(self, width: int, classes: int, *, hidden: int = 128):
        super().__init__()
        self.first, self.second = XavierLinear(width, hidden), XavierLinear(hidden, hidden)
        self.classes, self.offsets = Linear(hidden, classes + 1), Linear(hidden, 4 * classes)

    def forward(self, features: Float[Tensor, "N _ P P"]) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.second(torch.relu(self.first(features.flatten(1)))))
        return self.classes(x), self.offsets(x).unflatten(-1, (-1, 4))


@paper(on=r_cnn, year=2015, arxiv="1504.08083")
def fast_r_cnn(recipe: Part, *, bins: int = 5) -> Part:
    shared = part(SharedMap, backbone=recipe["model.regions.backbone"])
    return recipe.fill("maps", shared).fill("regions", RoIPool, bins=bins).fill("region_head", JointHead)
