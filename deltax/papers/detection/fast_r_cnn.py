"""Fast R-CNN. Girshick, 2015. arXiv:1504.08083

R-CNN, but the network runs once per image, and each region pools a fixed grid from the shared map.

Two thousand crops of one image share most pixels, and R-CNN computes them for each crop. RoI pooling crops the map in
place of the image, at whole cells, and keeps the maximum of each bin, so gradients of overlapping regions add up in the
shared network. Classes and boxes are trained jointly from the same two layers. The paper draws background from regions
of IoU 0.1 or more, which mines hard examples; here any region below 0.5 may be drawn.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.attention.scratch import scratch
from deltax.parts.detection.regions import Regions, stride_of
from deltax.parts.model.linear import Glorot, Linear
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps


class RoIPool(nn.Module):
    """`roi_pool` of the one shared map to bins x bins. Maps, images, N regions, strides -> (N, C, P, P)."""

    def __init__(self, width: int, *, bins: int = 5):
        super().__init__()
        self.bins, self.width = bins, width * bins**2

    def forward(
        self, maps: list[Maps], images: Images, regions: Regions, strides: tuple[int, ...] = ()
    ) -> Float[Tensor, "N _ P P"]:
        [shared], [stride] = maps, strides or [stride_of(images, m) for m in maps]
        return roi_pool(shared, regions, scale=1 / stride, out=self.bins)


class SharedMap(nn.Module):
    """The backbone's last map, computed once per image."""

    def __init__(self, channels: int, *, backbone: Part):
        super().__init__()
        self.backbone = backbone(channels)
        self.width, self.strides = self.backbone.width, self.backbone.strides[-1:]

    def forward(self, images: Images) -> list[Maps]:
        return [self.backbone(images)]


class JointHead(nn.Module):
    """Two layers on features (N, C, P, P); from these, class logits (N, V + 1) and offsets (N, V, 4)."""

    def __init__(self, width: int, classes: int, *, hidden: int = 128):
        super().__init__()
        self.first, self.second = Glorot(width, hidden), Glorot(hidden, hidden)
        self.classes, self.offsets = Linear(hidden, classes + 1), Linear(hidden, 4 * classes)

    def forward(self, features: Float[Tensor, "N _ P P"]) -> tuple[Tensor, Tensor]:
        # fc6 and fc7 of the paper
        x = torch.relu(self.second(torch.relu(self.first(features.flatten(1)))))
        return self.classes(x), self.offsets(x).unflatten(-1, (-1, 4))


@paper(on=r_cnn, year=2015, arxiv="1504.08083")
def fast_r_cnn(recipe: Part, *, bins: int = 5) -> Part:
    shared = part(SharedMap, backbone=recipe["model.regions.backbone"])
    return recipe.fill("maps", shared).fill("regions", RoIPool, bins=bins).fill("region_head", JointHead)


def roi_pool(maps: Images, regions: Regions, *, scale: float, out: int = 7) -> Float[Tensor, "N _ P P"]:
    """The maximum in each of out x out bins of each region (section 2.1).

    Corners are rounded to cells, inclusive; bins go from floor to ceil, so neighbouring bins may share a row; a bin
    outside the map is 0. The gradient goes to the first of equal maxima. `scale` is cells per pixel.
    """
    _, channels, rows, columns = maps.shape
    # round(v / 16) at the paper's stride
    x0, y0, x1, y1 = _rounded(at_least_float32(regions.boxes.detach()) * scale).long().unbind(-1)
    (top, bottom), (left, right) = _bins(y0, y1, rows, out), _bins(x0, x1, columns, out)
    each = lambda of_bin: of_bin.expand(-1, out, out).flatten()
    top, left = each(top[:, :, None]), each(left[:, None])
    high, wide = each(bottom[:, :, None]) - top, each(right[:, None]) - left
    count = high.clamp(min=0) * wide.clamp(min=0)
    # (S + 1, C), the last cell is 0
    cells = torch.cat([maps.permute(0, 2, 3, 1).reshape(-1, channels), maps.new_zeros(1, channels)])
    first = (each(regions.image[:, None, None] * rows) + top) * columns + left
    first = first.where(count > 0, len(cells) - 1)  # the cell of empty bins
    largest = _largest(cells.detach(), first, wide, count, columns)
    pooled = cells.flatten().gather(0, largest.flatten())  # (N P P, C)
    return pooled.view(-1, out, out, channels).permute(0, 3, 1, 2)


def _largest(cells: Tensor, first: Tensor, wide: Tensor, count: Tensor, columns: int) -> Int[Tensor, "B C"]:
    """For each bin and channel, the index of its maximum in `cells.flatten()`.

        cells          (S, C), the maps row by row, each of `columns`
        first, wide    a bin's first cell, and its number of cells per row
        count          a bin's number of cells; the first is read in any case

    All first cells are read, then all second ones: bins are sorted by size, so the bins that still have cells are the
    last.
    """
    keys, (count, order) = _keys(cells), count.sort()
    first, wide = first[order], wide[order]
    # keys order from the largest value down, so the minimum key is the maximum
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
    """Integers that order the values of a channel from the largest down, and equal values by index.

    The high 32 bits are the value's bits, flipped so that they fall as the value rises (or its rank, for float64); the
    low 32 bits are its index in `cells.flatten()`.
    """
    place = torch.arange(cells.numel(), device=cells.device).view_as(cells)
    if cells.dtype == torch.float64:
        value = cells.unique(return_inverse=True)[1].neg_()
    else:
        bits = (cells.float() + 0.0).view(torch.int32)  # -0 is 0
        value = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_not_().long()
    return value.bitwise_left_shift_(32).bitwise_or_(place)


def _rounded(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero, as C rounds."""
    return x.sign() * (x.abs() + 0.5).floor()


def _bins(low: Tensor, high: Tensor, cells: int, out: int) -> tuple[Tensor, Tensor]:
    """First cell, and one past the last, of each bin of each region, (N, P), by integer floor and ceil."""
    size, step = (high - low + 1).clamp(min=1)[:, None], torch.arange(out, device=low.device)
    # floor(step size / out), ceil((step + 1) size / out)
    first, last = step * size // out, -(-(step + 1) * size // out)
    return (low[:, None] + first).clamp(0, cells), (low[:, None] + last).clamp(0, cells)
