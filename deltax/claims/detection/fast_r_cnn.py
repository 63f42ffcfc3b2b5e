"""Claims of fast-r-cnn: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import claim
from deltax.papers.detection.fast_r_cnn import JointHead, fast_r_cnn, roi_pool
from deltax.papers.detection.r_cnn import SeparateHead, r_cnn
from deltax.parts.detection.boxes import corners
from deltax.parts.detection.regions import Regions
from deltax.shapes import Images


@claim
def the_largest_of_each_bin():
    """RoI pooling is the maximum over whole cells of each bin, bin by bin, also where regions reach outside; its
    gradient lands on the cells that were largest, and adds up where regions overlap."""
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    boxes = corners(torch.rand(40, 4, dtype=torch.float64) * torch.tensor([44.0, 36, 44, 36]))
    regions = Regions(boxes, torch.randint(0, 2, (40,)))
    pooled, slow = roi_pool(maps, regions, scale=0.25, out=3), _bin_by_bin(maps, regions, 0.25, 3)
    assert torch.equal(pooled, slow) and (pooled == 0).any()
    weight = torch.randn_like(pooled)
    ours, theirs = (torch.autograd.grad((p * weight).sum(), maps)[0] for p in (pooled, slow))
    torch.testing.assert_close(ours, theirs)


@claim
def a_region_of_everything_is_the_map():
    """Pooled to as many bins as it has cells, the whole image is its map, to the bit."""
    torch.manual_seed(0)
    maps = torch.randn(1, 4, 7, 7)
    whole = Regions(torch.tensor([[0.0, 0.0, 24.0, 24.0]]), torch.tensor([0]))
    assert torch.equal(roi_pool(maps, whole, scale=0.25, out=7), maps)


@claim
def both_losses_shape_the_features():
    """Classes and boxes both have a gradient in the features; in R-CNN only classes do."""
    torch.manual_seed(0)
    features = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for head, given in ((JointHead(18, 3), features), (SeparateHead(18, 3), features.flatten(1))):
        shaped = [
            torch.autograd.grad(said.square().sum(), features, retain_graph=True, allow_unused=True)[0] is not None
            for said in head.double()(given)
        ]
        assert shaped == [True, isinstance(head, JointHead)]


@claim.measured(paper="VGG16 tests 213 times faster than R-CNN (abstract), 146 times without SVD (Table 4)")
def cuts_the_map_not_the_image(lab):
    """With the same network and 100 regions of an image, the features of all of them are had at least 10 times sooner
    from the shared map than from crops."""
    torch.manual_seed(0)
    slow, fast = (recipe["model"](channels=1, classes=4).eval() for recipe in (r_cnn, r_cnn + fast_r_cnn))
    image, boxes = torch.randn(1, 1, 32, 32), corners(torch.rand(100, 4) * 12 + torch.tensor([6.0, 6, 4, 4]))
    regions = Regions(boxes, torch.zeros(100, dtype=torch.long))

    @torch.inference_mode()
    def look(model: nn.Module) -> None:
        model.region_head(model.regions(model.maps(image), image, regions))

    found = lab.ratio(lambda: look(fast), lambda: look(slow))
    if found.low > 10:
        outcome = "supported at this scale"
    elif found.high < 1:
        outcome = "opposite at this scale"
    else:
        outcome = "not seen at this scale" if found.high < 10 else "inconclusive"
    return lab.verdict(outcome, estimate=found.value, interval=found, unit="times as fast")


@claim.measured(paper="66.9 mAP against 66.0 of R-CNN on VOC 2007, both VGG16 (Table 1)")
def precision_is_kept(lab):
    """Trained on as many scenes, its AP50 is at most 3 points below that of R-CNN."""
    gaps = []
    for seed in lab.seeds(3):
        ours, theirs = (lab.train(recipe, seed=seed).evaluation.metrics for recipe in ("r-cnn+fast-r-cnn", "r-cnn"))
        gaps.append(ours.get("AP50", 0.0) - theirs.get("AP50", 0.0))
    return lab.at_least(gaps, -0.03, unit="AP50")


def _bin_by_bin(maps: Images, regions: Regions, scale: float, out: int) -> Float[Tensor, "N _ P P"]:
    """Section 2.1 as it is written."""
    rows = []
    for box, image in zip(regions.boxes, regions.image.tolist(), strict=True):
        x0, y0, x1, y1 = (int(v + math.copysign(0.5, v)) for v in (box * scale).tolist())
        high, wide = max(1, y1 - y0 + 1), max(1, x1 - x0 + 1)
        pooled = torch.zeros(maps.shape[1], out, out, dtype=maps.dtype)
        for i in range(out):
            for j in range(out):
                rows_of_bin = slice(max(0, y0 + i * high // out), max(0, y0 - (-(i + 1) * high // out)))
                columns_of_bin = slice(max(0, x0 + j * wide // out), max(0, x0 - (-(j + 1) * wide // out)))
                cells = maps[image, :, rows_of_bin, columns_of_bin].flatten(1)
                if cells.shape[1]:
                    pooled[:, i, j] = cells.max(1).values
        rows.append(pooled)
    return torch.stack(rows)
