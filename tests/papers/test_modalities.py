"""Three senses of digits, films of points, and circuits: the data's promises, and what is said of what cannot be."""

import numpy as np
import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.claims.multimodal.imagebind import _tiny as tiny_bound
from deltax.claims.multimodal.loretta import _tiny as tiny_gpt
from deltax.claims.vision.circuits.cla_visual_circuits import _tiny as tiny_resnet
from deltax.claims.vision.video.tracks_to_4d import optimised
from deltax.papers.multimodal.imagebind import bind
from deltax.papers.multimodal.loretta import linked
from deltax.papers.vision.circuits.cla_visual_circuits import cla_visual_circuits
from deltax.papers.vision.video.tracks_to_4d import Scene, tracks_to_4d
from deltax.parts.training.objectives import next_token
from deltax.tasks.images.tracks import Tracks, depth_error, image_error
from deltax.tasks.multimodal.linked_digits import LENGTHS, SOUND, START, WORD, LinkedDigits, read, spell
from deltax.tasks.multimodal.sounds import HOP, WIDTH, spectrograms, tones, waveform
from deltax.tasks.multimodal.spoken_numbers import FRAMES, NAMES, SpokenNumbers, found_among

TASKS = (SpokenNumbers, LinkedDigits, Tracks)


def flat(batch):
    return [x for x in batch if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("make", TASKS)
def test_a_smaller_batch_begins_a_larger_one(make):
    task = make()
    small, large, other = (task.batch(5, size=n, seed=s) for n, s in ((4, 0), (8, 0), (8, 1)))
    if make is LinkedDigits:
        for blocks, more in zip(task.pairs(5, size=4, seed=0), task.pairs(5, size=8, seed=0), strict=True):
            assert all(torch.equal(a[1], b[1][:2]) for a, b in zip(blocks, more, strict=True))
    else:
        assert all(torch.equal(a, b[:4]) for a, b in zip(flat(small), flat(large), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(flat(large), flat(other), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(flat(large), flat(task.batch(5, size=8, seed=0)), strict=True))


@pytest.mark.parametrize("make", TASKS)
def test_held_out_is_the_same_in_any_size(make):
    task = make(groups=1) if make is SpokenNumbers else make(held_out=9)
    whole, pieces = (list(task.held_out_batches(n)) for n in (64, 5))
    together = [torch.cat(parts) for parts in zip(*map(flat, pieces), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(flat(whole[0]), together, strict=True))
    assert len(task.held_out_documents()) == len(flat(whole[0])[0])
    assert task.fingerprint == type(task)(**({"groups": 1} if make is SpokenNumbers else {"held_out": 9})).fingerprint
    assert task.fingerprint != make().fingerprint


@pytest.mark.parametrize("make", TASKS)
def test_a_split_that_is_not_there_is_named(make):
    with pytest.raises(UserError, match=r"did you mean|validation or sealed"):
        list(make().held_out_batches(4, "valid"))
    with pytest.raises(UserError, match="whole number"):
        make(**{"groups" if make is SpokenNumbers else "held_out": 0})


def test_no_two_letters_sound_alike_and_speakers_differ():
    letters = [chr(ord("a") + i) for i in range(26)]
    assert len({tones(letter) for letter in letters}) == 26
    assert max(f for letter in letters for f in tones(letter)) * 1.07 < 2000
    longest, samples = max(NAMES, key=len), WIDTH + HOP * (FRAMES - 1)
    for draw in range(50):  # the last letter of the longest name is heard: without it the end is hiss
        whole, cut = (waveform(name, draw, samples) for name in (longest, longest[:-1]))
        assert np.abs(whole - cut).max() > 0.8
    a, b, c = spectrograms(["one", "one", "two"], np.array([1, 2, 1]), frames=8)
    assert (a != b).any() and (a != c).any()
    assert np.array_equal(a, spectrograms(["one"], np.array([1]), frames=8)[0])


def test_what_was_held_out_was_never_trained_on():
    task = SpokenNumbers()
    rows = {half: {int(r) for of in task._of[half] for r in of} for half in ("read", "heard", "validation", "sealed")}
    seen = set()
    for of in rows.values():
        assert of and not of & seen
        seen |= of


def test_finding_counts_by_group():
    vectors = torch.eye(6)[None].repeat(2, 1, 1)
    assert found_among(vectors, vectors).score == 0
    assert found_among(vectors, torch.stack([vectors[0], vectors[1].roll(1, 0)])).score == 50


def test_bound_batches_come_in_pieces():
    model, batch = tiny_bound()
    assert [len(piece.labels) for piece in batch.pieces(3)] == [1, 1, 1]
    assert bind(model, batch).shape == (3,) and batch.to("cpu").weights().sum() == 3


def test_a_model_that_copies_is_right():
    """A stand-in that says the digit that it reads of the last block is scored 0 for it, and 100 when always zero."""
    task = LinkedDigits(held_out=20)
    blocks, labels = task.held_out()
    assert (read(WORD, blocks[1][1]) == labels).all()
    assert read(WORD, torch.full((1, LENGTHS[WORD]), START)).tolist() == [-1]
    assert (read(SOUND, blocks[2][1]) == labels).mean() > 0.9
    assert spell(*blocks).shape == (len(labels), sum(LENGTHS) + 3)


def test_a_made_up_batch_can_be_learned_from():
    model, task = tiny_gpt(), LinkedDigits()
    batch = linked(model, task, 4, size=6, seed=0, warmup=0)
    losses = next_token(model, batch)
    assert losses.isfinite().all() and len(losses) == len(batch.inputs)
    evaluation = task.__class__(held_out=5).evaluate(model, next_token)
    assert 0 <= evaluation.score <= 100 and evaluation.metrics["% error, real sounds"] < 50


def test_the_truth_has_no_error_at_any_scale():
    films = Tracks(frames=5, points=7).batch(0, size=3, seed=0)
    zero = torch.zeros(3)
    torch.testing.assert_close(depth_error(2.5 * films.depth, films), zero, atol=1e-4, rtol=0)
    torch.testing.assert_close(image_error(films.tracks[..., :2], films), zero)
    assert (depth_error(torch.ones_like(films.depth), films) > 2).all()


def test_optimising_a_film_explains_it():
    films = Tracks(frames=5, points=7).batch(0, size=2, seed=0)
    before, after = (image_error(optimised(films.tracks, steps=n).seen()[0], films).mean() for n in (1, 60))
    assert after < before / 2
    assert isinstance(tracks_to_4d().build({"frames": 5})(films.tracks), Scene)


def test_a_circuit_that_cannot_be_is_refused():
    model, images, layers = tiny_resnet()
    with pytest.raises(UserError, match=r"no layer 'backbone.stam'.*backbone.stem"):
        cla_visual_circuits(model, images, ("backbone.stam", layers[1]))
    with pytest.raises(UserError, match="in the order in which they run"):
        cla_visual_circuits(model, images, layers[::-1])
    with pytest.raises(UserError, match="two or more layers"):
        cla_visual_circuits(model, images, layers[:1])
    with pytest.raises(UserError, match=r"model\.eval"):
        cla_visual_circuits(model.train(), images, layers)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_circuit_needs_no_gradient_to_be_on():
    model, images, layers = tiny_resnet()
    with torch.no_grad():
        found = cla_visual_circuits(model.requires_grad_(False), images, layers)
    assert found == cla_visual_circuits(model.requires_grad_(True), images, layers)


def test_dense_layers_have_circuits_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    circuit = cla_visual_circuits(model, torch.randn(4, 2, 2, 2), ("1", "3"), share=0.34)
    assert [len(neurons) for neurons in circuit.neurons] == [2, 2] and circuit.settled
