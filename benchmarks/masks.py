"""Multi-scale deformable attention and the loss of masks, both ways, against transformers' at equal shape."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import timing
from deltax.papers.detection.maskformer import MaskPredictions, mask_set_loss
from deltax.parts.attention.deformable import read
from deltax.tasks.detection.masks import MaskBatch

GRIDS = ((8, 8), (16, 16), (32, 32))  # strides 32, 16 and 8 of an image of 256 x 256


def main() -> None:
    from transformers import logging
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    cells = sum(rows * columns for rows, columns in GRIDS)
    values = torch.randn(2, cells, 8, 32, requires_grad=True)
    at = torch.rand(2, cells, 8, 3, 4, 2).requires_grad_()
    weights = torch.rand(2, cells, 8, 3, 4).requires_grad_()
    given = values, at, weights
    ours = lambda: read(values, GRIDS, at, weights)
    theirs = lambda: multi_scale_deformable_attention(values, list(GRIDS), at, weights)
    said, batch = _scenes()
    peer = _peer(said.logits.shape[-1] - 1)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "multi-scale deformable attention, forward": (_forward(ours), _forward(theirs)),
        "multi-scale deformable attention, both ways": (_both_ways(ours, given), _both_ways(theirs, given)),
        "MaskFormer's loss, 100 queries at 64 x 64, both ways": (
            _both_ways(lambda: mask_set_loss(said, batch).mean(), said),
            _both_ways(lambda: peer(said, batch), said),
        ),
    }
    rows = {}
    for name, (mine, others) in pairs.items():
        seconds = timing.interleave({"ours": mine, "theirs": others})
        rows[name] = timing.ratio(seconds["ours"], seconds["theirs"])
    timing.store("masks", rows)


def _forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


def _both_ways(call: Callable[[], Tensor], given: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().pow(2).sum(), given)


def _scenes() -> tuple[MaskPredictions, MaskBatch]:
    """What 100 queries might say of two scenes of eight objects, at a quarter of the images' 256 pixels."""
    said = MaskPredictions(torch.randn(1, 2, 100, 21).requires_grad_(), torch.randn(1, 2, 100, 64, 64).requires_grad_())
    labels, objects = torch.randint(0, 20, (2, 8)), torch.full((2,), 8.0)
    masks = torch.rand(2, 8, 256, 256) < 0.2
    return said, MaskBatch(torch.zeros(2, 3, 256, 256), torch.zeros(2, 8, 4), labels, objects, masks)


def _peer(classes: int) -> Callable[[MaskPredictions, MaskBatch], Tensor]:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    loss = MaskFormerLoss(classes, matcher, {}, 0.1)

    def call(said: MaskPredictions, batch: MaskBatch) -> Tensor:
        found = loss(said.masks[0], said.logits[0], list(batch.masks.float()), list(batch.labels))
        return found["loss_cross_entropy"] + 20 * found["loss_mask"] + found["loss_dice"]

    return call


if __name__ == "__main__":
    main()
