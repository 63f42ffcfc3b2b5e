"""The family of region detectors: how each is written, what it costs at the edges, and that each of them learns."""

from itertools import pairwise

import pytest
import torch

from deltax.claims.detection.fpn import _found
from deltax.errors import UserError
from deltax.expression import recipe
from deltax.lab.lab import Lab
from deltax.papers.detection.fast_r_cnn import RoIPool, fast_r_cnn, roi_pool
from deltax.papers.detection.faster_r_cnn import RPN
from deltax.papers.detection.fpn import Pyramid
from deltax.papers.detection.r_cnn import Crops, r_cnn
from deltax.papers.detection.retinanet import retinanet
from deltax.parts.detection.boxes import corners, iou
from deltax.parts.detection.detector import Anchors, Windows, region_loss
from deltax.parts.detection.regions import Regions
from deltax.recipe import diff
from deltax.tasks.detection.scenes import Scenes
from deltax.train.job import Job
from deltax.train.loop import build, train

LINE = ["r-cnn", "r-cnn+fast-r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn+fpn"]
ALL = [*LINE, "retinanet"]


def model_of(expression: str, **task) -> tuple[torch.nn.Module, Scenes]:
    scenes = Scenes(classes=4, held_out=8, **task)
    return build(recipe(expression)(), scenes, 0), scenes


def test_each_changes_only_its_own_slots():
    changed = [{path for path, _, _ in diff(recipe(a), recipe(b))} for a, b in pairwise(LINE)]
    inside = lambda path, paths: any(path.startswith(f"{other}.") for other in paths)
    assert [sorted(path for path in paths if not inside(path, paths)) for paths in changed] == [
        ["model.maps", "model.region_head", "model.regions"],
        ["model.proposals"],
        ["model.maps", "model.proposals.anchors.sides", "model.regions"],
    ]


def test_choices_made_before_are_kept():
    tree = r_cnn.set(Anchors, ratios=(0.5, 2.0)).put("model.regions.backbone.widths", (4, 6)) + fast_r_cnn
    after = recipe("r-cnn+fast-r-cnn+faster-r-cnn+fpn")
    assert tree["model.maps.backbone.widths"] == (4, 6) and tree["model.proposals.anchors.ratios"] == (0.5, 2.0)
    assert after["model.maps"].make is Pyramid and after["model.proposals"].make is RPN
    assert after["model.maps.backbone"] == r_cnn["model.regions.backbone"]
    assert r_cnn["model.proposals"].make is Windows and r_cnn["model.regions"].make is Crops


@pytest.mark.parametrize("expression", ALL)
def test_every_parameter_learns_and_detections_are_whole(expression):
    torch.manual_seed(0)
    model, task = model_of(expression)
    batch = task.batch(0, size=6, seed=0)
    loss = recipe(expression)["objective"](model, batch)
    assert loss.shape == (6,) and loss.isfinite().all()
    loss.mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in still if "top." not in name], still
    found = model.eval().detect(batch.images)
    assert found.scores.shape == found.labels.shape == (6, 20) and found.boxes.shape == (6, 20, 4)
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all() and found.labels.max() < 4
    box = corners(found.boxes)
    assert box.min() >= -1e-6 and box.max() <= 1 + 1e-6


@pytest.mark.parametrize("expression", ALL)
def test_scenes_without_objects(expression):
    torch.manual_seed(0)
    model, task = model_of(expression)
    batch = task.batch(0, size=3, seed=0)
    empty = batch._replace(labels=torch.full_like(batch.labels, -1), boxes=torch.zeros_like(batch.boxes))
    loss = recipe(expression)["objective"](model, empty)
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("expression", ALL)
def test_pieces_and_odd_sizes(expression):
    model, _ = model_of(expression)
    model.eval()
    wide = torch.randn(3, 1, 37, 45)
    whole = model.detect(wide)
    for i in range(3):
        alone = model.detect(wide[i : i + 1])
        torch.testing.assert_close(alone.scores[0], whole.scores[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expression", ["r-cnn+fast-r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn+fpn", "retinanet"])
def test_it_learns(expression):
    tree = recipe(expression, ["task.held_out=16", "loop.batch=8"])
    outcome = train(Job(tree, 0, 40, 1.0))
    losses = [loss for _, loss in outcome.progress.losses]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and set(outcome.evaluation.metrics) == {"AP", "AP50"}


def test_windows_hold_most_digits_and_proposals_are_sorted():
    batch = Scenes(classes=4).batch(0, size=64, seed=0)
    windows = r_cnn["model.proposals"](1)([], batch.images)
    assert windows.boxes.shape == (64, 128, 4) and windows.boxes.min() >= 0 and windows.boxes.max() <= 32
    best = iou(windows.boxes[:, :, None], corners(batch.boxes)[:, None] * 32).amax(1)
    assert (best[batch.labels >= 0] > 0.5).float().mean() > 0.9
    model, _ = model_of(LINE[2])
    said = model.proposals(model.maps(batch.images), batch.images)
    assert said.boxes.shape == (64, 50, 4) and said.real.any(1).all()
    assert (iou(said.boxes[:, :, None], said.boxes[:, None]).tril(-1)[said.real] <= 0.7 + 1e-6).all()


def test_a_head_shared_by_levels_wants_as_many_anchors_on_each():
    with pytest.raises(ValueError, match="as many sides"):
        Anchors(sides=((8.0,), (16.0, 32.0)))
    with pytest.raises(ValueError, match="give sides for each map"):
        Anchors(sides=((8.0,),))([(4, 4, 8), (2, 2, 16)])
    with pytest.raises(UserError, match="has nothing at"):
        retinanet + fast_r_cnn


def test_pooled_regions_of_nothing():
    none = Regions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert roi_pool(torch.randn(1, 3, 4, 4), none, scale=0.5, out=3).shape == (0, 3, 3, 3)
    outside = Regions(torch.tensor([[90.0, 90, 99, 99]]), torch.tensor([0]))
    assert (RoIPool(3, bins=2)([torch.ones(1, 3, 4, 4)], torch.zeros(1, 1, 8, 8), outside) == 0).all()


def test_a_region_is_taught_what_it_overlaps():
    """The one region on an object has its class and its offsets; whoever says so exactly has no loss left."""

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proposals = Windows(1, anchors=r_cnn["model.proposals.anchors"])

        def forward(self, images, boxes, real):
            from deltax.parts.detection.detector import Proposals, Said

            regions = Regions(torch.tensor([[4.0, 4, 12, 16], [20, 20, 30, 30]]), torch.tensor([0, 0]))
            logits = torch.tensor([[0.0, 99, 0], [0, 0, 99]])
            offsets = torch.zeros(2, 2, 4)
            return Said(Proposals(boxes, real), regions, logits, offsets, torch.tensor([0, -1]))

    batch = Scenes(size=32, most=1).batch(0, size=1, seed=0)
    box = torch.tensor([[[8.0, 10, 8, 12]]]) / 32
    batch = batch._replace(boxes=box, labels=torch.tensor([[1]]))
    assert region_loss(Oracle(), batch).item() == pytest.approx(0, abs=1e-6)
    wrong = batch._replace(labels=torch.tensor([[0]]))
    assert region_loss(Oracle(), wrong).item() == pytest.approx(99 / 2)
    moved = batch._replace(boxes=box + torch.tensor([8.0 / 32 / 10 * 0.5, 0, 0, 0]))
    assert region_loss(Oracle(), moved).item() == pytest.approx(0.5 * 0.5**2 / 2, rel=1e-3)


def test_recall_of_small_objects_counts_classes_and_sizes():
    class Run:
        task = Scenes(size=64, classes=4, sides=(8, 24), held_out=8)

        class model:
            @staticmethod
            def detect(images):
                from deltax.parts.detection.boxes import Detections

                batch = next(b for b in Run.task.held_out_batches(32) if len(b.images) == len(images))
                small = batch.boxes[..., 3] * 64 < 9
                return Detections((batch.labels >= 0).float() * small, batch.labels.clamp(min=0), batch.boxes)

    assert _found(Run, 8) == 1.0 and 0 < _found(Run, 32) < 1


def test_a_measured_speed_up_ends_in_a_verdict(tmp_path):
    from deltax.claims.detection.fast_r_cnn import cuts_the_map_not_the_image
    from deltax.lab.store import Store

    verdict = cuts_the_map_not_the_image(Lab(Store(tmp_path)))
    assert verdict.estimate > 1 and verdict.outcome != "opposite at this scale"
