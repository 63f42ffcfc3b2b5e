"""Claims of fpn: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.detection.fast_r_cnn import RoIPool, fast_r_cnn
from deltax.papers.detection.faster_r_cnn import faster_r_cnn
from deltax.papers.detection.fpn import ByLevel, Pyramid, fpn, level_of, top_down
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.detection.boxes import corners, iou
from deltax.parts.detection.detector import Anchors
from deltax.parts.detection.regions import Regions
from deltax.shapes import Maps
from deltax.tasks.detection.scenes import Scenes


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
