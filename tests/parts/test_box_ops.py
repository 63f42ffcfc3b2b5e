"""Anchors, offsets, assignment, sampling, suppression and regions against plain loops and independent libraries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltax.parts.detection.boxes import (
    IGNORED,
    NOTHING,
    Detections,
    anchor_grid,
    area,
    assign,
    centred,
    clip,
    decode,
    gather,
    giou,
    iou,
    nms,
    rescue,
    sample,
    suppress,
)  # fmt: skip
from deltax.parts.detection.regions import Regions, roi_align, stride_of


def boxes_of(n: int, side: float = 20.0) -> torch.Tensor:
    low = torch.rand(n, 2, dtype=torch.float64) * side
    return torch.cat([low, low + 0.5 + torch.rand(n, 2, dtype=torch.float64) * side], -1)


def test_overlaps_equal_transformers_with_gradients():
    from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

    torch.manual_seed(0)
    a, b = boxes_of(13).requires_grad_(), boxes_of(7)
    for ours, theirs in ((giou, generalized_box_iou(a, b)), (iou, box_iou(a, b)[0])):
        mine = ours(a[:, None], b)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), a)[0] for t in (mine, theirs)))


def test_anchors_stand_on_cells_with_their_area_and_ratio():
    grid = anchor_grid(3, 4, 8.0, sides=(5.0, 9.0), ratios=(0.5, 1.0, 2.0)).view(3, 4, 2, 3, 4)
    middle = centred(grid)
    torch.testing.assert_close(middle[2, 1, ..., :2], torch.tensor([12.0, 20.0]).expand(2, 3, 2))
    torch.testing.assert_close(area(grid)[1, 2], torch.tensor([[25.0] * 3, [81.0] * 3]))
    torch.testing.assert_close(middle[0, 0, 1, :, 3] / middle[0, 0, 1, :, 2], torch.tensor([0.5, 1.0, 2.0]))


def test_offsets_have_gradients_and_no_side_explodes():
    torch.manual_seed(0)
    offsets = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    anchors = boxes_of(9)
    assert torch.autograd.gradcheck(lambda t: decode(t, anchors), offsets)
    huge = decode(torch.full((1, 4), 50.0), torch.tensor([[0.0, 0, 2, 4]]))
    assert (huge[:, 2:] - huge[:, :2]).tolist() == [pytest.approx([125, 250])]
    torch.testing.assert_close(clip(huge, 7, 9), torch.tensor([[9.0, 7, 9, 7]]).minimum(huge.clamp(min=0)))


def test_assignment_box_by_box():
    torch.manual_seed(0)
    anchors, objects, real = boxes_of(60), boxes_of(5), torch.tensor([True, True, False, True, True])
    overlaps = iou(anchors[:, None], objects)
    found = assign(overlaps, real, low=0.2, high=0.35)
    saved = rescue(found, overlaps, real)
    best = {j: max(overlaps[i, j].item() for i in range(60)) for j in (0, 1, 3, 4)}
    for i in range(60):
        mine = {j: overlaps[i, j].item() for j in (0, 1, 3, 4)}
        top = max(mine, key=mine.get)
        expected = top if mine[top] >= 0.35 else NOTHING if mine[top] < 0.2 else IGNORED
        assert found[i] == expected
        assert saved[i] == (top if any(mine[j] == best[j] > 0 for j in mine) else expected)
    assert set(found.tolist()) >= {NOTHING, IGNORED} and not torch.equal(found, saved)
    nobody = torch.zeros(5, dtype=torch.bool)
    assert (assign(overlaps, nobody, low=0.2, high=0.4) == NOTHING).all()
    assert torch.equal(rescue(found, overlaps, nobody), found)
    none = overlaps[:, :0]
    assert (rescue(assign(none, real[:0], low=0.2, high=0.4), none, real[:0]) == NOTHING).all()


def test_samples_are_full_balanced_and_random():
    torch.manual_seed(0)
    positive = torch.zeros(3, 50, dtype=torch.bool)
    positive[0, :20], positive[1, :2] = True, True
    draws = [sample(positive, ~positive, 16, 0.25) for _ in range(200)]
    for chosen in draws:
        assert chosen.sum(1).tolist() == [16, 16, 16]
        assert (chosen & positive).sum(1).tolist() == [4, 2, 0]
    often = torch.stack(draws).float().mean(0)
    torch.testing.assert_close(often[0, :20], torch.full((20,), 0.2), rtol=0, atol=0.12)
    scarce = sample(positive, torch.zeros_like(positive), 16, 0.25)
    assert scarce.sum(1).tolist() == [4, 2, 0]


@given(st.integers(0, 700), st.sampled_from([0.2, 0.5, 0.8]), st.integers(1, 4), st.integers(0, 99))
def test_suppression_in_groups_is_suppression_of_each(n, threshold, groups, seed):
    torch.manual_seed(seed)
    boxes, scores, group = boxes_of(n, 60.0), torch.rand(n), torch.randint(0, groups, (n,))
    kept = nms(boxes, scores, threshold, group)
    for name in range(groups):
        here = group == name
        assert torch.equal(kept[here], nms(boxes[here], scores[here], threshold))
    rows = Detections(scores[None], group[None], centred(boxes)[None])
    if n:
        assert torch.equal(suppress(rows, threshold).scores[0] > 0, kept & (scores > 0))


def test_chains_of_removals_are_followed_to_their_end():
    """Each box removes its neighbour, so every second one stays, also where a chain runs on over several blocks."""
    at = torch.arange(2000, dtype=torch.float64) * 4
    boxes = torch.stack([at, torch.zeros_like(at), at + 10, torch.ones_like(at)], -1)
    kept = nms(boxes, -at, 0.4)
    assert torch.equal(kept, torch.arange(2000) % 2 == 0)


def test_gathered_rows_are_the_best_of_each_image():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    image = torch.tensor([2, 0, 2, 2, 0])
    found = gather(scores, torch.arange(5), torch.arange(20.0).view(5, 4), image, images=4, most=2)
    assert found.scores.tolist() == [pytest.approx(r) for r in ([0.9, 0.3], [0, 0], [0.7, 0.5], [0, 0])]
    assert found.labels.tolist() == [[1, 4], [0, 0], [3, 2], [0, 0]]
    assert found.boxes[2, 1].tolist() == [8.0, 9.0, 10.0, 11.0]


def bilinear(cells: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The value between cell centres; at most one cell outside it is the border's, and beyond it nothing."""
    rows, columns = cells.shape
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return cells.sum() * 0
    y, x = min(max(y, 0.0), rows - 1), min(max(x, 0.0), columns - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
    above = cells[y0, x0] * (1 - x + x0) + cells[y0, x1] * (x - x0)
    below = cells[y1, x0] * (1 - x + x0) + cells[y1, x1] * (x - x0)
    return above * (1 - y + y0) + below * (y - y0)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_aligned_regions_sample_by_sample(samples):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes, image = boxes_of(8, 24.0) - 6, torch.tensor([0, 1] * 4)
    ours = roi_align(maps, Regions(boxes, image), scale=0.25, out=2, samples=samples)
    slow = torch.zeros_like(ours)
    for n, (x0, y0, x1, y1) in enumerate((boxes * 0.25 - 0.5).tolist()):
        for c in range(2):
            for i in range(2):
                for j in range(2):
                    ys = [y0 + (y1 - y0) * (i + (s + 0.5) / samples) / 2 for s in range(samples)]
                    xs = [x0 + (x1 - x0) * (j + (s + 0.5) / samples) / 2 for s in range(samples)]
                    at = [bilinear(maps[image[n], c], y, x) for y in ys for x in xs]
                    slow[n, c, i, j] = sum(at) / len(at)
    torch.testing.assert_close(ours, slow)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((t * weight).sum(), maps)[0] for t in (ours, slow)))


def test_no_regions_and_no_bins():
    maps, none = (
        torch.randn(1, 3, 4, 4, requires_grad=True),
        Regions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    )
    assert roi_align(maps, none, scale=0.5, out=3).shape == (0, 3, 3, 3)
    assert roi_align(maps, none, scale=0.5, out=3, samples=0).shape == (0, 3, 3, 3)
    with pytest.raises(ValueError, match="at least one bin"):
        roi_align(maps, none, scale=0.5, out=0)


@pytest.mark.parametrize(
    ("pixels", "cells", "stride"), [(32, 8, 4), (33, 9, 4), (37, 5, 8), (24, 24, 1), (799, 50, 16), (20, 2, 16)]
)
def test_strides_of_odd_sizes(pixels, cells, stride):
    """One axis may have a single cell, which fits many strides; the other settles it, whichever it is."""
    short = -(-3 // stride)
    assert stride_of(torch.zeros(1, 1, pixels, 3), torch.zeros(1, 1, cells, short)) == stride
    assert stride_of(torch.zeros(1, 1, 3, pixels), torch.zeros(1, 1, short, cells)) == stride
