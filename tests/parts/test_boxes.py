"""Boxes against independent formulae: areas counted cell by cell on a grid, pairs compared in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltax.parts.detection.boxes import Detections, area, centred, corners, giou, iou, nms, suppress

SIDE = 9


@st.composite
def grid_box(draw) -> list[int]:
    x0, y0 = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return [x0, y0, draw(st.integers(x0 + 1, SIDE)), draw(st.integers(y0 + 1, SIDE))]


def cells(box: list[int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def tensor(box: list[float]) -> torch.Tensor:
    return torch.tensor(box, dtype=torch.float64)


@given(grid_box(), grid_box())
def test_overlaps_are_counted_cells(a, b):
    ours, theirs = cells(a), cells(b)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    shared, either = len(ours & theirs), len(ours | theirs)
    assert area(tensor(a)).item() == len(ours)
    assert iou(tensor(a), tensor(b)).item() == pytest.approx(shared / either, abs=1e-12)
    assert giou(tensor(a), tensor(b)).item() == pytest.approx(shared / either - (hull - either) / hull, abs=1e-12)


@settings(deadline=None)  # the first assert_close imports half of torch
@given(grid_box(), grid_box(), st.floats(0.1, 10), st.floats(-5, 5))
def test_overlaps_know_neither_order_nor_unit(a, b, scale, shift):
    one, other = tensor(a), tensor(b)
    for overlap in (iou, giou):
        torch.testing.assert_close(overlap(one, other), overlap(other, one))
        torch.testing.assert_close(overlap(one * scale + shift, other * scale + shift), overlap(one, other))


@given(grid_box())
def test_conversions_are_inverse(box):
    there = centred(tensor(box))
    assert there[:2].tolist() == [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    assert there[2:].tolist() == [box[2] - box[0], box[3] - box[1]]
    assert torch.equal(corners(there), tensor(box))


def test_all_pairs_by_broadcasting():
    torch.manual_seed(0)
    a, b = corners(torch.rand(5, 4)), corners(torch.rand(3, 4))
    table = giou(a[:, None], b)
    assert table.shape == (5, 3)
    for i in range(5):
        for j in range(3):
            torch.testing.assert_close(table[i, j], giou(a[i], b[j]))


def test_empty_boxes_overlap_by_zero_and_have_gradients():
    point = torch.zeros(4, requires_grad=True)
    assert iou(point, point).item() == 0.0
    giou(point, torch.zeros(4)).backward()
    assert point.grad.isfinite().all()


def greedy(boxes: list[list[int]], scores: list[float], threshold: float) -> list[bool]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        one = cells(boxes[i])
        if all(len(one & cells(boxes[j])) <= threshold * len(one | cells(boxes[j])) for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


@given(st.lists(grid_box(), max_size=8), st.sampled_from([0.0, 0.31, 0.5, 0.77]), st.randoms())
def test_suppression_is_greedy(boxes, threshold, random):
    scores = [i / 10 + 0.05 for i in range(len(boxes))]
    random.shuffle(scores)
    kept = nms(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), torch.tensor(scores), threshold)
    assert kept.tolist() == greedy(boxes, scores, threshold)


def test_suppression_stays_within_a_class_and_an_image():
    box = centred(torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]))
    found = Detections(
        torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.6, 0.7]]), torch.tensor([[1, 1, 2], [3, 3, 3]]), torch.stack([box, box])
    )
    after = suppress(found)
    assert after.scores.tolist() == torch.tensor([[0.9, 0.0, 0.7], [0.0, 0.0, 0.7]]).tolist()
    assert torch.equal(after.boxes, found.boxes) and found.scores[0, 1] == 0.8
