import numpy as np
import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.parts.training.objectives import classify
from deltax.tasks.images.digits import SPLITS, DigitDrawings, Digits


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_splits_share_no_image_and_hold_them_all():
    task = Digits()
    seen = [{image.numpy().tobytes() for image in task.all(split).images} for split in SPLITS]
    sizes = [len(task.all(split).labels) for split in SPLITS]
    assert sum(sizes) == 1797
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    np.testing.assert_allclose(np.array(sizes) / 1797, (0.70, 0.15, 0.15), atol=0.03)
    assert all(set(task.all(split).labels.tolist()) == set(range(10)) for split in SPLITS)


def test_images_are_what_scikit_learn_has():
    from sklearn.datasets import load_digits

    theirs = {tuple(x.ravel()): y for x, y in zip(load_digits().images, load_digits().target, strict=True)}
    for split in SPLITS:
        images, labels = Digits().all(split)
        assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
        for image, label in zip(images, labels, strict=True):
            assert theirs[tuple(((image.double() + 1) * 8).flatten().tolist())] == label


def test_a_batch_is_a_pure_function_of_step_size_and_seed():
    a, b = (Digits().batch(3, size=17, seed=5) for _ in range(2))
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    smaller = Digits().batch(3, size=6, seed=5)
    assert torch.equal(smaller.images, a.images[:6])
    for step, seed in ((4, 5), (3, 6)):
        assert not torch.equal(Digits().batch(step, size=17, seed=seed).images, a.images)


def test_batches_draw_every_training_image_and_no_other():
    task = Digits()
    drawn = {image.numpy().tobytes() for image in task.batch(0, size=30_000, seed=1).images}
    assert drawn == {image.numpy().tobytes() for image in task.all("train").images}


def test_pieces_put_together_are_the_batch():
    batch = Digits().batch(0, size=7, seed=0)
    pieces = batch.pieces(3)
    assert torch.equal(torch.cat([p.images for p in pieces]), batch.images)
    assert torch.equal(torch.cat([p.labels for p in pieces]), batch.labels)
    assert torch.equal(batch.weights(), torch.ones(7))


@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_held_out_is_the_same_whatever_the_size(size):
    task = Digits(held_out=90)
    images = torch.cat([b.images for b in task.held_out_batches(size, "sealed")])
    assert torch.equal(images, task.all("sealed").images) and len(images) == 90
    assert len(task.held_out_documents("sealed")) == 90


def test_score_is_the_mean_loss_and_accuracy_the_share_that_is_right():
    task, model = Digits(), linear()
    evaluation = task.evaluate(model, classify)
    images, labels = task.all()
    logits = model(images)
    assert evaluation.score == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert evaluation.metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert evaluation.values.shape == evaluation.weights.shape == evaluation.clusters.shape == labels.shape


def test_a_linear_classifier_learns_them():
    task, model = Digits(), linear()
    before = task.accuracy(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(200):
        classify(model, task.batch(step, size=64, seed=0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.4 < 0.9 < task.accuracy(model)


def test_drawings_are_scored_by_the_objective_alone():
    task = DigitDrawings()
    error = lambda model, batch: (model(batch.images) - batch.images).square().mean((1, 2, 3))
    evaluation = task.evaluate(nn.Sequential(nn.Conv2d(1, 1, 1)), error)
    assert evaluation.metrics == {} and evaluation.score == pytest.approx(evaluation.values.mean())
    assert task.unit != Digits.unit


def test_the_fingerprint_follows_what_is_asked():
    assert Digits().fingerprint == Digits().fingerprint == Digits(held_out=1000).fingerprint
    assert Digits().fingerprint != Digits(held_out=50).fingerprint


@pytest.mark.parametrize("held_out", [0, -1, 2.5, True, "all"])
def test_a_bad_count_is_told(held_out):
    with pytest.raises(UserError, match="held_out must be a whole number"):
        Digits(held_out=held_out)


def test_a_misspelt_split_is_told():
    with pytest.raises(UserError, match="did you mean 'validation'"):
        Digits().all("validatoin")
