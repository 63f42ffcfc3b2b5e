"""Fast R-CNN. Girshick, 2015. arXiv:1504.08083

R-CNN, but the network runs once for each image: every region pools a fixed grid from the map that all share.

Two thousand crops of one image are mostly the same pixels, computed two thousand times. RoI pooling cuts the map instead
of the image, at whole cells, and keeps the largest value of each bin, so that gradients of overlapping regions meet in
the shared network; classes and boxes then learn together, from the same two layers. The paper draws background from
regions of IoU 0.1 on, which mines hard examples; here any region below 0.5 may be drawn.
"""


import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.papers.detection.r_cnn import r_cnn
from deltax.papers.vision.resnet import Backbone
from deltax.parts.boxes import corners
from deltax.parts.linear import Glorot, Linear
from deltax.parts.regions import Regions, stride_of
from deltax.shapes import Images


def roi_pool(maps: Images, regions: Regions, *, scale: float, out: int = 7) -> Float[Tensor, "N C P P"]:
    """The largest value in each of out x out bins of each region (section 2.1).

    Corners are rounded to cells and belong to the region; bins reach from floor to ceil, so neighbours may share a row;
    a bin outside the map is 0. The gradient goes to the first of the largest cells. `scale` is cells a pixel.
    """
    _, channels, rows, columns = maps.shape
    x0, y0, x1, y1 = _rounded(regions.boxes.detach() * scale).long().unbind(-1)
    (top, bottom), (left, right) = _bins(y0, y1, rows, out), _bins(x0, x1, columns, out)
    each = lambda of_bin: of_bin.expand(-1, out, out).flatten()
    top, left = each(top[:, :, None]), each(left[:, None])
    high, wide = each(bottom[:, :, None]) - top, each(right[:, None]) - left

    # Every bin is a bag of cells. Where its largest are is what `embedding_bag` knows, and `gather` has the gradient.
    count = high.clamp(min=0) * wide.clamp(min=0)
    first = count.cumsum(0) - count
    bag = torch.arange(len(count), device=maps.device).repeat_interleave(count)
    step = torch.arange(len(bag), device=maps.device) - first[bag]
    row = each(regions.image[:, None, None] * rows)[bag] + top[bag] + step // wide[bag]
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    index = row * columns + left[bag] + step % wide[bag]
    *_, largest = torch.embedding_bag(cells.detach(), index, first, mode=2)
    pooled = cells.gather(0, largest.clamp(min=0)).masked_fill((count == 0)[:, None], 0.0)
    return pooled.view(-1, out, out, channels).permute(0, 3, 1, 2)


def _rounded(x: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero, as C rounds."""
    return x.sign() * (x.abs() + 0.5).floor()


def _bins(low: Tensor, high: Tensor, cells: int, out: int) -> tuple[Tensor, Tensor]:
    """First cell and one past the last of each bin of each region, (N, P): whole-number floor and ceil."""
    size, step = (high - low + 1).clamp(min=1)[:, None], torch.arange(out, device=low.device)
    first, last = step * size // out, -(-(step + 1) * size // out)
    return (low[:, None] + first).clamp(0, cells), (low[:, None] + last).clamp(0, cells)


class RoIPool(nn.Module):
    """`roi_pool` of the one map to bins x bins. Maps, images, N regions -> (N, C, P, P)."""

    def __init__(self, width: int, *, bins: int = 5):
        super().__init__()
        self.bins, self.width = bins, width * bins**2

    def forward(self, maps: list[Images], images: Images, regions: Regions) -> Float[Tensor, "N C P P"]:
        [shared] = maps
        return roi_pool(shared, regions, scale=1 / stride_of(images, shared), out=self.bins)


class SharedMap(nn.Module):
    """The last map of the network, once for each image."""

    def __init__(self, channels: int, *, backbone: Part = part(Backbone)):
        super().__init__()
        self.backbone = backbone(channels)
        self.width = self.backbone.width

    def forward(self, images: Images) -> list[Images]:
        return [self.backbone(images)]


class JointHead(nn.Module):
    """Two layers of features (N, C, P, P), and of these both class logits (N, V + 1) and offsets (N, V, 4)."""

    def __init__(self, width: int, classes: int, *, hidden: int = 128):
        super().__init__()
        self.first, self.second = Glorot(width, hidden), Glorot(hidden, hidden)
        self.classes, self.offsets = Linear(hidden, classes + 1), Linear(hidden, 4 * classes)

    def forward(self, features: Float[Tensor, "N C P P"]) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.second(torch.relu(self.first(features.flatten(1)))))
        return self.classes(x), self.offsets(x).unflatten(-1, (-1, 4))


@paper(on=r_cnn, year=2015, arxiv="1504.08083")
def fast_r_cnn(recipe: Part, *, bins: int = 5) -> Part:
    shared = part(SharedMap, backbone=recipe["model.regions.backbone"])
    return recipe.fill("maps", shared).fill("regions", RoIPool, bins=bins).fill("region_head", JointHead)
