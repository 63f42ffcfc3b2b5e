"""Scenes: deterministic, true to their boxes, without a digit seen in training; precision judged by known answers."""

import sys

import numpy as np
import pytest
import torch

from deltax.errors import UserError
from deltax.parts.detection.boxes import Detections, corners, iou
from deltax.tasks.detection import scenes
from deltax.tasks.detection.scenes import NOTHING, Batch, Scenes, average_precision, draw


@pytest.fixture(scope="module")
def task() -> Scenes:
    return Scenes(held_out=40)


def truth(batch: Batch) -> Detections:
    return Detections((batch.labels >= 0).float(), batch.labels.clamp(min=0), batch.boxes)


def test_a_batch_depends_on_step_size_and_seed_alone(task):
    late = [Scenes().batch(step, size=5, seed=3) for step in (100, 2)]
    for batch, step in zip(late, (100, 2), strict=True):
        for mine, other in zip(task.batch(step, size=5, seed=3), batch, strict=True):
            assert torch.equal(mine, other)
    one = task.batch(2, size=5, seed=3)
    assert not torch.equal(one.images, task.batch(3, size=5, seed=3).images)
    assert not torch.equal(one.images, task.batch(2, size=5, seed=4).images)
    for mine, other in zip(one[:3], task.batch(2, size=9, seed=3)[:3], strict=True):
        assert torch.equal(mine, other[:5])


def test_boxes_hold_the_ink_and_nothing_else_does(task):
    batch = task.batch(0, size=64, seed=1)
    assert batch.images.shape == (64, 1, 32, 32) and batch.images.min() == -1 and batch.images.max() <= 1
    for image, boxes, labels in zip(batch.images[:, 0], batch.boxes, batch.labels, strict=True):
        rest = image.clone()
        for x0, y0, x1, y1 in (corners(boxes[labels >= 0]) * 32).round().int().tolist():
            assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 32
            inside = image[y0:y1, x0:x1] > -0.5
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            rest[y0:y1, x0:x1] = -1
        assert (rest == -1).all()
    assert ((batch.labels >= 0) == (batch.boxes[..., 2] > 0)).all()


def test_scenes_are_empty_and_full_and_digits_leave_each_other_visible(task):
    batch = task.batch(5, size=400, seed=0)
    counts = torch.bincount((batch.labels >= 0).sum(1), minlength=4)
    assert len(counts) == 4 and counts.min() > 40
    assert set(batch.labels.unique().tolist()) == {NOTHING, *range(10)}
    assert batch.objects.unique().tolist() == [pytest.approx((batch.labels >= 0).sum().item() / 400)]
    overlaps = iou(corners(batch.boxes)[:, :, None], corners(batch.boxes)[:, None])
    assert overlaps.masked_fill(torch.eye(3, dtype=torch.bool), 0).max() <= 0.1 + 1e-6


def test_no_held_out_digit_stands_in_a_training_scene():
    seen = {
        split: {glyph.tobytes() for glyph, _ in scenes._glyphs(split, 10)}
        for split in ("train", "validation", "sealed")
    }
    assert all(len(glyphs) > 200 for glyphs in seen.values())
    assert not seen["train"] & (seen["validation"] | seen["sealed"]) and not seen["validation"] & seen["sealed"]


def test_fewer_classes_are_the_first_digits():
    task = Scenes(classes=3)
    assert task.task_spec == {"channels": 1, "size": 32, "classes": 3}
    assert set(task.batch(0, size=64, seed=0).labels.unique().tolist()) == {NOTHING, 0, 1, 2}


def test_held_out_scenes_are_fixed(task):
    one, other = (torch.cat([b.images for b in task.held_out_batches(size)]) for size in (7, 100))
    assert torch.equal(one, other) and len(one) == len(task.held_out_documents()) == 40
    assert len({float(b.objects[0]) for b in task.held_out_batches(7)}) == 1
    assert not torch.equal(one, torch.cat([b.images for b in task.held_out_batches(40, "sealed")]))


def test_pieces_keep_what_the_whole_batch_knows(task):
    batch = task.batch(0, size=7, seed=0)
    pieces = batch.pieces(3)
    assert [len(p.images) for p in pieces] == [3, 3, 1] and pieces[2].objects[0] == batch.objects[0]
    for i, tensor in enumerate(batch):
        assert torch.equal(torch.cat([p[i] for p in pieces]), tensor)
    assert torch.equal(batch.weights(), torch.ones(7)) and batch.to("meta").boxes.device.type == "meta"


def test_the_truth_has_precision_one_and_chance_has_next_to_none(task):
    everything = torch.cat([b.images for b in task.held_out_batches(40)])
    answers = truth(next(iter(task.held_out_batches(40))))
    seen = iter(range(0, 40, 64))

    def detect(images):
        assert torch.equal(images, everything[next(seen) :][:64])
        return answers

    assert task.precision(detect) == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}
    assert task.chance()["AP50"] < 0.1


def test_precision_counts_doubles_misses_and_sloppy_boxes():
    box = torch.tensor([[[0.5, 0.5, 0.5, 0.5]] * 2])
    one = Batch(torch.zeros(1, 1, 32, 32), box, torch.tensor([[4, NOTHING]]), torch.ones(1))
    judge = lambda scores, labels, boxes: average_precision(
        [Detections(torch.tensor([scores]), torch.tensor([labels]), boxes)], [one], 32
    )
    right = judge([0.9, 0.0], [4, 4], box)
    assert right == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}
    assert judge([0.9, 0.8], [5, 4], box) == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}
    shifted = box + torch.tensor([0.125, 0, 0, 0])  # IoU 3/5: above two of the ten thresholds, or on the third
    sloppy = judge([0.9, 0.0], [4, 4], shifted)
    assert sloppy["AP50"] == pytest.approx(1) and sloppy["AP"] == pytest.approx(0.3, abs=0.11)
    first_wrong = judge([0.9, 0.8], [4, 4], torch.stack([box[0, 0] * torch.tensor([0.3, 1, 1, 1]), box[0, 0]])[None])
    assert first_wrong["AP50"] == pytest.approx(0.5)
    assert judge([0.0, 0.0], [4, 4], box) == {"AP": 0.0, "AP50": 0.0}


def test_evaluation_is_the_loss_a_scene_and_the_precision(task):
    class Model(torch.nn.Linear):
        def detect(self, images):
            return truth(next(iter(task.held_out_batches(40))))

    found = task.evaluate(Model(1, 1), lambda model, batch: (batch.labels >= 0).float().sum(1))
    assert found.score == pytest.approx(np.mean(found.values)) and found.metrics["AP50"] == pytest.approx(1)
    assert len(found.values) == len(found.clusters) == 40
    assert task.evaluate(torch.nn.Linear(1, 1), lambda model, batch: batch.objects).metrics == {}


def test_what_is_drawn_is_what_was_found(task):
    batch = task.batch(0, size=9, seed=0)
    figure = draw(batch.images, truth(batch), batch)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 8
    for axes, labels in zip(shown, batch.labels, strict=False):
        count = int((labels >= 0).sum())
        assert len(axes.patches) == 2 * count and len(axes.texts) == count
    assert not draw(batch.images[:1], Detections(*(t[:1] * 0 for t in truth(batch)))).axes[0].patches


def test_fingerprint_follows_the_settings(task):
    assert (
        len(
            {
                t.fingerprint
                for t in (task, Scenes(held_out=41), Scenes(size=40, held_out=40), Scenes(most=2, held_out=40))
            }
        )
        == 4
    )
    assert Scenes(held_out=40).fingerprint == task.fingerprint


@pytest.mark.parametrize(
    "given",
    [
        {"size": 8},
        {"size": 32.0},
        {"most": 0},
        {"classes": 11},
        {"held_out": -1},
        {"sides": (7,)},
        {"sides": ()},
        {"sides": (9, 33)},
    ],
)
def test_arguments_that_make_no_sense(given):
    with pytest.raises(UserError, match=next(iter(given))):
        Scenes(**given)


def test_a_misspelt_split_and_a_missing_package_say_what_to_do(task, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'validation'"):
        next(task.held_out_batches(4, "valdation"))
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install 'deltax-ml\[detection\]'"):
        average_precision([], [], 32)
    monkeypatch.setattr(scenes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'deltax-ml\[detection\]'"):
        Scenes()
