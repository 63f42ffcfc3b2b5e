"""MaskFormer and Mask2Former: what each changes, and that each learns, is judged, and meets bad input."""

import numpy as np
import pytest
import torch

from deltax.errors import UserError
from deltax.expression import recipe
from deltax.papers.detection.mask2former import anywhere, inside, mask2former
from deltax.papers.detection.maskformer import maskformer
from deltax.parts.detection.masks import PixelClassifier, classify_pixels
from deltax.recipe import diff
from deltax.tasks.detection.masks import MaskScenes
from deltax.train.job import Job
from deltax.train.loop import build, train

BOTH = ["maskformer", "mask2former"]


def model_of(key: str) -> tuple[torch.nn.Module, MaskScenes]:
    scenes = MaskScenes(size=24, classes=4, held_out=8)
    return build(recipe(key)(), scenes, 0), scenes


def test_each_changes_only_its_own_slots():
    changed = {path for path, _, _ in diff(maskformer, mask2former)}
    topmost = sorted(path for path in changed if not any(path.startswith(f"{other}.") for other in changed))
    assert topmost == [
        "model.decoder", "model.pixel_pyramid", "objective.compare_at", "objective.learn_at", "objective.pixel_loss",
        "objective.weights",
    ]  # fmt: skip
    plain = mask2former.put("model.decoder.attention_mask", anywhere)
    assert [path for path, _, _ in diff(mask2former, plain)] == ["model.decoder.attention_mask"]


@pytest.mark.parametrize("key", BOTH)
def test_every_parameter_learns_from_scenes(key):
    torch.manual_seed(0)
    model, task = model_of(key)
    batch = task.batch(0, size=6, seed=0)
    assert (batch.labels >= 0).any()
    recipe(key)["objective"](model, batch).sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    # A stream of zeros has nothing to ask itself, and deformable attention starts the same wherever it stands.
    early = ("decoder.layers.blocks.0.mixer", "pixel_pyramid.level")
    assert not [name for name in still if not name.startswith(early)], still
    found = model.eval().segment(batch.images)
    assert found.scores.shape == found.labels.shape == (6, 6) and found.masks.shape == (6, 6, 24, 24)
    assert model.panoptic(batch.images).shape == (6, 24, 24, 2)


@pytest.mark.parametrize("key", BOTH)
def test_scenes_without_objects_and_odd_sizes(key):
    torch.manual_seed(0)
    model, task = model_of(key)
    batch = task.batch(0, size=3, seed=0)
    empty = batch._replace(labels=torch.full_like(batch.labels, -1), masks=torch.zeros_like(batch.masks))
    loss = recipe(key)["objective"](model, empty._replace(objects=torch.zeros(3)))
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    wide = torch.randn(2, 1, 29, 37)
    assert model.eval().segment(wide).masks.shape == (2, 6, 29, 37)


@pytest.mark.parametrize("key", BOTH)
def test_it_learns(key):
    tree = recipe(key, ["task.held_out=16", "loop.batch=8"])
    outcome = train(Job(tree, 0, 25, 1.0))
    losses = [loss for _, loss in outcome.progress.losses]
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8]) and set(outcome.evaluation.metrics) == {"AP", "AP50", "PQ"}


def test_the_classifier_of_pixels_learns_and_merges_what_touches():
    tree = maskformer.fill("model", PixelClassifier).fill("objective", classify_pixels)
    outcome = train(Job(tree.put("task.held_out", 16).put("loop.batch", 8), 0, 25, 1.0))
    losses = [loss for _, loss in outcome.progress.losses]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8]) and set(outcome.evaluation.metrics) == {"PQ"}

    model = build(tree(), MaskScenes(size=24, classes=4, held_out=8), 0).eval()
    logits = torch.full((1, 5, 24, 24), 0.0)
    logits[:, 4] = 1.0
    logits[0, 2, 3:6, 3:9] = logits[0, 2, 9, 3:9] = logits[0, 1, 6, 3:9] = 2.0
    model.forward = lambda images: logits
    said = model.panoptic(torch.zeros(1, 1, 24, 24))
    assert [len(said[0, ..., 1][said[0, ..., 0] == c].unique()) for c in (1, 2)] == [1, 2]
    assert (said[logits.argmax(1) == 4] == -1).all() and len(said[..., 1].unique()) == 4


def test_a_query_looks_inside_its_mask_or_everywhere():
    masks = torch.full((1, 3, 8, 8), -1.0)
    masks[0, 0, :4, :4] = 1.0
    masks[0, 1] = 1.0
    seen = inside(masks, 2, 2)
    assert seen[0].tolist() == [[True, False, False, False], [True] * 4, [True] * 4]
    assert anywhere(masks, 2, 2) is None


def test_more_objects_than_queries_and_too_few_maps():
    task = MaskScenes(size=24, classes=4, held_out=8)
    few = build(recipe("maskformer").put("model.queries", 1)(), task, 0)
    with pytest.raises(UserError, match=r"set model\.queries to at least"):
        recipe("maskformer")["objective"](few, task.batch(0, size=16, seed=0))
    short = recipe("mask2former").put("model.backbone.widths", (16, 32)).put("model.backbone.depths", (1, 1))
    with pytest.raises(ValueError, match="2 stages has too few maps"):
        build(short(), task, 0)
