"""Regions of maps: each box of an image as a grid of the same size, by bilinear samples.

`roi_pool`, the older way with whole cells and the largest of each bin, is what Fast R-CNN added: it stands there.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax.shapes import Images, Maps


class Regions(NamedTuple):
    """Boxes by their corners, in pixels, and the image of the batch that each is in."""

    boxes: Float[Tensor, "N 4"]
    image: Int[Tensor, "N"]


def stride_of(images: Images, maps: Maps) -> int:
    """How many pixels a cell of the maps stands for: the nearest power of two, since odd sizes are rounded up."""
    return 2 ** round(torch.tensor(images.shape[-2] / maps.shape[-2]).log2().item())


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
    samples  along each side of a bin; 0 takes one for each cell that the bin spans, rounded up
    least    smallest side of a region, in cells

    A sample up to one cell outside the map has the value at the border; one farther out is 0. The first released code
    has shift=0 and least=1. Not differentiable in the boxes. Raises ValueError for a grid without bins.
    """
    if out < 1 or samples < 0:
        raise ValueError(f"a region has at least one bin and no fewer than 0 samples, not {out} and {samples}")
    _, channels, rows, columns = maps.shape
    x0, y0, x1, y1 = (regions.boxes.detach() * scale - shift).unbind(-1)
    along = [
        _interpolation(low, (high - low).clamp(min=least) if least else high - low, n, out, samples)
        for low, high, n in ((y0, y1, rows), (x0, x1, columns))
    ]
    (y, of_y), (x, of_x) = along
    index = regions.image[:, None, None, None, None] * (rows * columns) + y[:, :, None, :, None] * columns
    index = (index + x[:, None, :, None, :]).flatten(0, 2).flatten(1)
    weight = (of_y[:, :, None, :, None] * of_x[:, None, :, None, :]).flatten(0, 2).flatten(1).to(maps.dtype)
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    bins = nn.functional.embedding_bag(index, cells, per_sample_weights=weight, mode="sum")
    return bins.view(-1, out, out, channels).permute(0, 3, 1, 2)


def _interpolation(low: Tensor, size: Tensor, cells: int, out: int, samples: int) -> tuple[Tensor, Tensor]:
    """The cells (N, P, 2 S) that each bin of an axis reads and what each counts for.

    Rows and columns separate, for the weight of a bilinear sample is a product, and so is whether it is inside.
    """
    bin_size = size / out
    count = torch.full_like(size, samples) if samples else bin_size.ceil().clamp(min=0)
    most = max(1, int(count.max())) if len(count) else 1
    step = torch.arange(most, device=low.device)
    at = (step + 0.5) / count.clamp(min=1)[:, None]
    at = low[:, None, None] + (torch.arange(out, device=low.device)[:, None] + at[:, None]) * bin_size[:, None, None]
    counted = (at >= -1) & (at <= cells) & (step < count[:, None])[:, None]
    at = at.clamp(0, cells - 1)
    first = at.floor().clamp(max=max(0, cells - 2))
    second = (first + 1).clamp(max=cells - 1)
    share = torch.where(counted, 1 / count.clamp(min=1)[:, None, None], 0.0)
    weight = torch.cat([share * (1 - (at - first)), share * (at - first)], -1)
    return torch.cat([first, second], -1).long(), weight
