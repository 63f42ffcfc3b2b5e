"""Regions of maps and suppression, forward and backward, against torchvision's compiled operators at equal shape."""

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peer_torchvision, timing
from deltax.papers.detection.fast_r_cnn import roi_pool
from deltax.papers.detection.retinanet import focal
from deltax.parts.detection.boxes import giou, nms
from deltax.parts.detection.regions import Regions, roi_align

SCALE = 1 / 16


def main() -> None:
    """In a process of its own, where torchvision can be loaded without harm to the other benchmarks."""
    if reason := peer_torchvision.missing():
        print(f"detection is not measured: {reason}")
        return
    subprocess.run([sys.executable, "-m", "benchmarks.detection"], check=True)


def measure() -> None:
    peer_torchvision.load()
    from torchvision import ops

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    maps = torch.randn(2, 64, 50, 50, requires_grad=True)
    boxes, image = _boxes(256, 800.0, 300.0), torch.randint(0, 2, (256,))
    regions, rois = Regions(boxes, image), torch.cat([image[:, None].float(), boxes], 1)
    many, scores, classes = _boxes(2000, 500.0, 200.0), torch.rand(2000), torch.randint(0, 20, (2000,))
    a, b = (_boxes(2000, 500.0, 200.0).requires_grad_() for _ in range(2))
    logits, targets = torch.randn(20_000, 20, requires_grad=True), (torch.rand(20_000, 20) < 0.002).float()
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "RoI pool, 256 regions of 64 channels to 7 x 7": (
            _both_ways(lambda x: roi_pool(x, regions, scale=SCALE), maps),
            _both_ways(lambda x: ops.roi_pool(x, rois, 7, SCALE), maps),
        ),
        "RoI align, 256 regions of 64 channels to 7 x 7": (
            _both_ways(lambda x: roi_align(x, regions, scale=SCALE), maps),
            _both_ways(lambda x: ops.roi_align(x, rois, 7, SCALE, 2, True), maps),
        ),
        "NMS at 0.5 of 2000 boxes": (lambda: nms(many, scores, 0.5), lambda: ops.nms(many, scores, 0.5)),
        "NMS at 0.5 of 2000 boxes in 20 classes": (
            lambda: nms(many, scores, 0.5, classes),
            lambda: ops.batched_nms(many, scores, classes, 0.5),
        ),
        "GIoU of 2000 pairs of boxes": (
            _both_ways(lambda x: giou(x, b), a),
            _both_ways(lambda x: ops.generalized_box_iou_loss(x, b), a),
        ),
        "focal loss of 20,000 anchors and 20 classes": (
            _both_ways(lambda x: focal(x, targets), logits),
            _both_ways(lambda x: ops.sigmoid_focal_loss(x, targets), logits),
        ),
    }
    rows = {}
    for name, (ours, theirs) in pairs.items():
        seconds = timing.interleave({"ours": ours, "peer": theirs}, rounds=15, warmup=2)
        rows[f"{name}, against torchvision"] = timing.ratio(seconds["ours"], seconds["peer"])
    timing.store("detection", rows)


def _boxes(n: int, side: float, largest: float) -> Tensor:
    low = torch.rand(n, 2) * side
    return torch.cat([low, (low + torch.rand(n, 2) * largest + 1).clamp(max=side)], 1).clamp(max=side)


def _both_ways(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    gradient = torch.randn_like(call(x))

    def step() -> None:
        torch.autograd.grad(call(x), x, gradient)

    return step


if __name__ == "__main__":
    measure()
