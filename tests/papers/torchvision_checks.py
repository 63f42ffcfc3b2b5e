"""Our box operations and detectors against torchvision's. Run as a program: torchvision needs a process of its own."""

# ruff: noqa: E402  the peer is loaded before anything that could look for it

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import peer_torchvision

peer_torchvision.load()

import torch
from torch import Tensor
from torchvision import ops
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

from deltax import part
from deltax.papers.detection.fast_r_cnn import RoIPool, roi_pool
from deltax.papers.detection.faster_r_cnn import RPN
from deltax.papers.detection.fpn import ByLevel, Pyramid, level_of
from deltax.papers.detection.retinanet import DenseHead, TopConvolutions, focal
from deltax.papers.vision.backbones.resnet import Backbone
from deltax.parts.detection.boxes import (
    IGNORED,
    NOTHING,
    Detections,
    anchor_grid,
    assign,
    centred,
    decode,
    encode,
    giou,
    iou,
    nms,
    rescue,
    suppress,
)  # fmt: skip
from deltax.parts.detection.detector import Anchors, by_cell
from deltax.parts.detection.regions import Regions, roi_align

F64 = torch.float64


def random_boxes(n: int, side: float = 400.0, outside: float = 0.0) -> Tensor:
    low = torch.rand(n, 2, dtype=F64) * (side + 2 * outside) - outside
    return torch.cat([low, low + torch.rand(n, 2, dtype=F64) ** 2 * side], -1)


def same(ours: Tensor, theirs: Tensor, *inputs: Tensor, **tolerance: float) -> None:
    """Equal values, and equal gradients in each input."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    weight = torch.randn_like(theirs)
    for x in inputs:
        mine, other = (torch.autograd.grad((out * weight).sum(), x, retain_graph=True)[0] for out in (ours, theirs))
        torch.testing.assert_close(mine, other, **tolerance)


def overlaps() -> None:
    a, b = random_boxes(37).requires_grad_(), random_boxes(23)
    same(iou(a[:, None], b), ops.box_iou(a, b), a)
    same(giou(a[:, None], b), ops.generalized_box_iou(a, b), a)


def suppression() -> None:
    for n in (0, 1, 7, 300, 1500):
        boxes, scores, groups = random_boxes(n), torch.rand(n, dtype=F64), torch.randint(0, 5, (n,))
        boxes[n // 2 :] = boxes[: n - n // 2] + 3 * torch.rand(n - n // 2, 4, dtype=F64)
        for threshold in (0.0, 0.3, 0.5, 0.7):
            kept = nms(boxes, scores, threshold).nonzero()[:, 0]
            assert torch.equal(kept, ops.nms(boxes, scores, threshold).sort().values)
            kept = nms(boxes, scores, threshold, groups).nonzero()[:, 0]
            assert torch.equal(kept, ops.batched_nms(boxes, scores, groups, threshold).sort().values)
            if n:
                rows = Detections(scores[None], groups[None], centred(boxes)[None])
                assert torch.equal(suppress(rows, threshold).scores[0].nonzero()[:, 0], kept)


def region_of_interest() -> tuple[Tensor, Regions, Tensor]:
    """Maps, regions inside, across and outside the border, and the same as torchvision writes them."""
    maps, image = torch.randn(3, 5, 23, 31, dtype=F64, requires_grad=True), torch.randint(0, 3, (150,))
    boxes = random_boxes(150, 460, outside=90)
    boxes[:9, 2:] = boxes[:9, :2] + 0.3
    return maps, Regions(boxes, image), torch.cat([image[:, None].to(F64), boxes], 1)


def pooled_regions() -> None:
    for bins in (1, 3, 7):
        maps, regions, theirs = region_of_interest()
        ours = roi_pool(maps, regions, scale=1 / 16, out=bins)
        same(ours, ops.roi_pool(maps, theirs, bins, 1 / 16), maps, rtol=0, atol=0 if bins < 2 else 1e-12)
        assert torch.equal(ours, ops.roi_pool(maps, theirs, bins, 1 / 16))


def aligned_regions() -> None:
    for bins, samples in ((7, 2), (5, 0), (1, 3), (4, 1)):
        maps, regions, theirs = region_of_interest()
        ours = roi_align(maps, regions, scale=1 / 16, out=bins, samples=samples)
        same(ours, ops.roi_align(maps, theirs, bins, 1 / 16, samples or -1, aligned=True), maps)
        ours = roi_align(maps, regions, scale=1 / 16, out=bins, samples=samples, shift=0.0, least=1.0)
        same(ours, ops.roi_align(maps, theirs, bins, 1 / 16, samples or -1, aligned=False), maps)


def focal_loss() -> None:
    logits = (5 * torch.randn(7, 9, dtype=F64)).requires_grad_()
    targets = (torch.rand(7, 9) < 0.2).to(F64)
    for gamma, alpha in ((2.0, 0.25), (0.5, 0.7), (0.0, -1.0)):
        theirs = ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
        same(focal(logits, targets, gamma=gamma, alpha=alpha), theirs, logits)


def box_coding() -> None:
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(60) + torch.tensor([0.0, 0, 1, 1]), random_boxes(60) + torch.tensor([0.0, 0, 1, 1])
    torch.testing.assert_close(encode(boxes, anchors), coder.encode_single(boxes, anchors))
    offsets = (3 * torch.randn(60, 4, dtype=F64)).requires_grad_()
    same(decode(offsets, anchors), coder.decode_single(offsets, anchors), offsets)


def assignment() -> None:
    from torchvision.models.detection._utils import Matcher

    objects, anchors = random_boxes(11), random_boxes(500)
    overlaps, real = iou(anchors[:, None], objects), torch.ones(11, dtype=torch.bool)
    for low, high in ((0.3, 0.7), (0.4, 0.5)):
        plain = assign(overlaps, real, low=low, high=high)
        for ours, low_quality in ((plain, False), (rescue(plain, overlaps, real), True)):
            theirs = Matcher(high, low, allow_low_quality_matches=low_quality)(overlaps.mT)
            assert torch.equal(ours, theirs) and {NOTHING, IGNORED} <= set(ours.tolist())


def anchors() -> None:
    """torchvision centres anchors on corners of cells and rounds them; ours are half a stride further on."""
    generator = AnchorGenerator(((32, 64), (128, 256)), ((0.25, 1.0, 4.0),) * 2)
    maps = [torch.zeros(1, 1, 7, 9), torch.zeros(1, 1, 4, 5)]
    theirs = generator(ImageList(torch.zeros(1, 1, 56, 72), [(56, 72)]), maps)[0]
    ours = []
    for m, sides in zip(maps, generator.sizes, strict=True):
        high, wide = 56 // m.shape[-2], 72 // m.shape[-1]
        grid = anchor_grid(*m.shape[-2:], 1.0, sides=sides, ratios=(0.25, 1.0, 4.0)).view(-1, 6, 4)
        y, x = torch.meshgrid(torch.arange(m.shape[-2]), torch.arange(m.shape[-1]), indexing="ij")
        places = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
        # Ours at a stride of 1, moved to theirs: ratios there run slowest, sides fastest.
        grid = grid - 0.5 + places * (torch.tensor([wide, high, wide, high]) - 1)
        ours.append(grid.view(-1, 2, 3, 4).transpose(1, 2).reshape(-1, 4))
    torch.testing.assert_close(torch.cat(ours), theirs)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module.double()


def pyramid() -> None:
    images = torch.randn(2, 3, 75, 53, dtype=F64, requires_grad=True)
    backbone = part(Backbone, stem_width=4, widths=(4, 6, 10), depths=(1, 1, 1))
    for first in (0, 1):
        for top in (None, TopConvolutions):
            ours = part(Pyramid, backbone=backbone, dim=8, first=first)(3) if top is None else None
            extra = ops.feature_pyramid_network.LastLevelMaxPool()
            if ours is None:
                ours = part(Pyramid, backbone=backbone, dim=8, first=first, top=top)(3)
                extra = ops.feature_pyramid_network.LastLevelP6P7(10, 8)
            randomise(ours).eval()
            theirs = ops.FeaturePyramidNetwork(list(ours.backbone.widths[first:]), 8, extra).double()
            state = {}
            for kind, block in (("lateral", "inner_blocks"), ("smooth", "layer_blocks")):
                state |= {f"{block}.{k.replace('.', '.0.', 1)}": v for k, v in getattr(ours, kind).state_dict().items()}
            if top is not None:
                names = {"p6": ours.top.first, "p7": ours.top.second}
                state |= {f"extra_blocks.{n}.{k}": v for n, m in names.items() for k, v in m.state_dict().items()}
            theirs.load_state_dict(state)
            maps = list(ours.backbone.each(images))[first:]
            if top is not None:
                extra.use_P5 = False
            mine, other = ours(images), theirs({str(i): m for i, m in enumerate(maps)}).values()
            for a, b in zip(mine, other, strict=True):
                same(a, b, images)


def retinanet_head() -> None:
    ours, theirs = randomise(DenseHead(6, 5, 3, depth=4)), RetinaNetHead(6, 3, 5).double()
    state = {}
    for side, tower, last, name in (
        ("classification_head", ours.class_tower, ours.classes, "cls_logits"),
        ("regression_head", ours.box_tower, ours.offsets, "bbox_reg"),
    ):
        state |= {f"{side}.conv.{k.replace('.', '.0.', 1)}": v for k, v in tower.state_dict().items()}
        state |= {f"{side}.{name}.{k}": v for k, v in last.state_dict().items()}
    theirs.load_state_dict(state)
    maps = [torch.randn(2, 6, n, n + 2, dtype=F64, requires_grad=True) for n in (9, 5, 2)]
    mine, other = ours(maps), theirs(maps)
    same(mine[0], other["cls_logits"], *maps)
    same(mine[1], other["bbox_regression"], *maps)


def proposal_head() -> None:
    ours = randomise(RPN(6, anchors=part(Anchors, sides=((8.0, 16.0),) * 2), hidden=6))
    theirs = RPNHead(6, ours.anchors.count).double()
    state = {f"conv.0.0.{k}": v for k, v in ours.conv.state_dict().items()}
    state |= {f"cls_logits.{k}": v for k, v in ours.objectness.state_dict().items()}
    theirs.load_state_dict(state | {f"bbox_pred.{k}": v for k, v in ours.offsets.state_dict().items()})
    maps = [torch.randn(2, 6, n, n, dtype=F64, requires_grad=True) for n in (16, 8)]
    scores, offsets, *_ = ours(maps, torch.zeros(2, 1, 64, 64, dtype=F64)).said
    logits, moves = theirs(maps)
    same(scores, torch.cat([by_cell(t, 1) for t in logits], 1)[..., 0], *maps)
    same(offsets, torch.cat([by_cell(t, 4) for t in moves], 1), *maps)


def levels() -> None:
    """Which level torchvision gives a box; and what is cut from it, by its own multi-scale alignment of one size."""
    from torchvision.ops.poolers import LevelMapper

    boxes = random_boxes(500, 1500) + torch.tensor([0.0, 0, 1, 1])
    ours = level_of(boxes, home=2, side=224.0, levels=4)
    assert torch.equal(ours, LevelMapper(2, 5)([boxes])) and len(ours.unique()) == 4
    cut = ByLevel(3, inner=part(RoIPool, bins=2), levels=2)
    images, boxes = torch.zeros(1, 1, 32, 32, dtype=F64), random_boxes(9, 30)
    maps = [torch.randn(1, 3, n, n, dtype=F64) for n in (16, 8)]
    found = cut(maps, images, Regions(boxes, torch.zeros(9, dtype=torch.long)))
    level = level_of(boxes, home=1.0, side=14.0, levels=2).tolist()
    for box, k, mine in zip(boxes, level, found, strict=True):
        theirs = ops.roi_pool(maps[k], [box[None]], 2, spatial_scale=0.5 ** (k + 1))
        torch.testing.assert_close(mine, theirs[0])


CHECKS = (
    overlaps, suppression, pooled_regions, aligned_regions, focal_loss, box_coding, assignment, anchors, pyramid,
    retinanet_head, proposal_head, levels,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = 0
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
            print("equal", check.__name__)
        except Exception:
            failed += 1
            print("DIFFERS", check.__name__)
            traceback.print_exc()
    sys.exit(failed > 0)
