"""Regions of maps: each box of an image as a grid of the same size, by bilinear samples.

`roi_pool`, the older way with whole cells and the largest of each bin, is what Fast R-CNN added: it stands there.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax.errors import UserError
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps


class Regions(NamedTuple):
    """Boxes by their corners, in pixels, and the image of the batch that each is in."""

    boxes: Float[Tensor, "N 4"]
    image: Int[Tensor, "N"]


def stride_of(images: Images, maps: Maps) -> int:
    """How many pixels a cell of the maps stands for: the one power of two that gives both the rows and the columns.

    A network that has `strides` is asked for them instead. Raises UserError where sizes leave none, or leave several:
    one cell may stand for any stride from the image's side on.
    """
    sizes = list(zip(images.shape[-2:], maps.shape[-2:], strict=True))
    powers = [2**k for k in range(max(images.shape[-2:]).bit_length() + 2)]
    fit = [s for s in powers if all(-(-pixels // s) == cells for pixels, cells in sizes)]
    if len(fit) != 1:
        image, grid = (" x ".join(map(str, shape[-2:])) for shape in (images.shape, maps.shape))
        raise UserError(
            f"maps of {grid} cells of an image of {image} pixels fit {len(fit)} strides; give the network's `strides`"
        )
    return fit[0]


def roi_align(
    maps: Images,
    regions: Regions,
    *,
    scale: float,
    out: int = 7,
    samples: int = 2,
    shift: float = 0.5,
    least: float = 0.0,
) -> Float[Tensor, "N C P P"]:
    """Each region as out x out bins, a bin the mean of samples x samples bilinear samples (arXiv:1703.06870).

    scale    cells a pixel; a cell's value stands at its centre, `shift` from its corner
    samples  along each side of a bin; 0 takes one for each cell that the bin spans, rounded up; where that is more than
             the map has, whole rows and columns are summed, so that memory does not grow with the size of a region
    least    smallest side of a region, in cells

    A sample up to one cell outside the map has the value at the border; one farther out is 0. The first released code
    has shift=0 and least=1. Not differentiable in the boxes. Raises UserError for a grid without bins.
    """
    if out < 1 or samples < 0:
        raise UserError(f"a region has at least one bin and no fewer than 0 samples, not {out} and {samples}")
    _, channels, rows, columns = maps.shape
    x0, y0, x1, y1 = (at_least_float32(regions.boxes.detach()) * scale - shift).unbind(-1)
    along = [
        _interpolation(low, (high - low).clamp(min=least) if least else high - low, n, out, samples)
        for low, high, n in ((y0, y1, rows), (x0, x1, columns))
    ]
    (y, of_y), (x, of_x) = along
    if not samples and y.shape[-1] * x.shape[-1] * out > rows * columns:
        return _by_rows_and_columns(maps, regions.image, *along)
    index = regions.image[:, None, None, None, None] * (rows * columns) + y[:, :, None, :, None] * columns
    index = (index + x[:, None, :, None, :]).flatten(0, 2).flatten(1)
    weight = (of_y[:, :, None, :, None] * of_x[:, None, :, None, :]).flatten(0, 2).flatten(1).to(maps.dtype)
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    bins = nn.functional.embedding_bag(index, cells, per_sample_weights=weight, mode="sum")
    return bins.view(-1, out, out, channels).permute(0, 3, 1, 2)


def _by_rows_and_columns(
    maps: Images, image: Int[Tensor, "N"], of_y: tuple[Tensor, Tensor], of_x: tuple[Tensor, Tensor]
) -> Float[Tensor, "N C P P"]:
    """sum_yx of_y[n, p, y] of_x[n, q, x] maps[image[n], c, y, x]: what each row and each column counts for, in turn."""
    weights = []
    for (cell, weight), cells in ((of_y, maps.shape[-2]), (of_x, maps.shape[-1])):
        whole = weight.new_zeros(*weight.shape[:2], cells)
        weights.append(whole.scatter_add_(2, cell, weight).to(maps.dtype))
    order = image.argsort(stable=True)
    count = torch.bincount(image, minlength=len(maps)).tolist()
    bins = []
    for shared, mine in zip(maps, order.split(count), strict=True):
        rows = torch.einsum("npy,cyx->ncpx", weights[0][mine], shared)
        bins.append(torch.einsum("ncpx,nqx->ncpq", rows, weights[1][mine]))
    return torch.cat(bins)[order.argsort()]


def _interpolation(low: Tensor, size: Tensor, cells: int, out: int, samples: int) -> tuple[Tensor, Tensor]:
    """The cells (N, P, 2 S) that each bin of an axis reads and what each counts for.

    Rows and columns separate, for the weight of a bilinear sample is a product, and so is whether it is inside. Of a
    bin's samples one for each cell, which lie at least half a cell apart, those before the map are passed over and no
    more are taken than the map can hold.
    """
    if not samples:  # float32 counts only to 2^24
        low, size = low.double(), size.double()
    bin_size = (size / out)[:, None, None]
    count = torch.full_like(bin_size, samples) if samples else bin_size.ceil().clamp(min=0)
    low = low[:, None, None] + torch.arange(out, device=low.device)[:, None] * bin_size
    most, before = samples, torch.zeros_like(low)
    if not samples:
        most = int(count.nan_to_num(1.0).clamp(max=2 * cells + 5).max()) if len(count) else 1
        before = ((-1 - low) * count / bin_size.clamp(min=1e-6) - 1.5).floor().clamp(min=0).nan_to_num(0.0)
    step = before + torch.arange(most, device=low.device)
    at = low + (step + 0.5) / count.clamp(min=1) * bin_size
    counted = (at >= -1) & (at <= cells) & (step < count)
    at = at.where(counted, 0.0).clamp(0, cells - 1)
    first = at.floor().clamp(max=max(0, cells - 2))
    second = (first + 1).clamp(max=cells - 1)
    share = torch.where(counted, 1 / count.clamp(min=1), 0.0)
    weight = torch.cat([share * (1 - (at - first)), share * (at - first)], -1)
    return torch.cat([first, second], -1).long(), weight
