"""Tokenizers of pictures and videos: what their parts refuse, what they share, and that every recipe trains."""

from dataclasses import replace

import pytest
import torch

from deltax import UserError, part
from deltax.claims.checking import randomise
from deltax.expression import recipe as read
from deltax.papers.generative.fsq import FSQ, fsq
from deltax.papers.generative.vq_vae import Codebook, ConvEncoder, MovingCodebook, nearest, usage, vq_vae
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.video.cosmos_tokenizer import CosmosDecoder, CosmosEncoder, cosmos_tokenizer
from deltax.papers.vision.video.factorized_spacetime import AlongTime, PastConv, WithinFrames, factorized_spacetime
from deltax.papers.vision.video.haar_wavelet_tokenizer import Haar, analysed, haar_wavelet_tokenizer, synthesised
from deltax.papers.vision.video.rope_3d import Rotary3D, groups, turns, unravelled
from deltax.papers.vision.video.vitok import CubeEncoder, floats, standing, vitok
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal, everywhere
from deltax.parts.model.autoencoder import Autoencoder, Gaussian, NoBottleneck, absolute, decibels, rebuild, squared
from deltax.parts.model.videos import Cubes, as_maps, as_stream, cubed, film, uncubed
from deltax.tasks.images.videos import Batch, MovingDigits
from deltax.train.job import Job
from deltax.train.loop import train
from deltax.train.machine import Machine

RECIPES = [
    "vq-vae",
    "vq-vae+fsq",
    "cosmos-tokenizer",
    "cosmos-tokenizer(levels=1)+fsq(levels=(8,5))",
    "vit+vitok",
    "vit+vitok+factorized-spacetime",
    "vit+factorized-spacetime",
    "gpt+rope+rope-3d",
]


def small(expression: str):
    recipe = read(expression)
    return recipe.put("loop.batch", 4).put("task.held_out", 200)


@pytest.mark.parametrize("expression", RECIPES)
def test_every_recipe_trains(expression):
    outcome = train(Job(small(expression), 0, 2, 1.0), replace(Machine.here(), threads=1))
    assert not outcome.diverged
    assert all(p.grad is None or p.grad.isfinite().all() for p in outcome.model.parameters())


@pytest.mark.parametrize("expression", [name for name in RECIPES if not name.startswith("gpt")])
def test_every_parameter_learns(expression):
    run = small(expression)
    task = run["task"]()
    model = randomise(run().build(task.task_spec), std=0.2).float()
    run["objective"](model, task.batch(0, size=4, seed=0)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    single = [] if "vitok" in expression else ["rest.mixer."]  # a picture has one frame: nothing to choose in time
    alone = lambda name: any(s in name for s in single) and (".query." in name or ".key." in name)
    assert not [name for name in silent if not name.endswith("key.bias") and not alone(name)], silent


# The task


def test_a_batch_is_a_pure_function_of_step_size_and_seed():
    task = MovingDigits(frames=3)
    a, b = (task.batch(3, size=7, seed=5) for _ in range(2))
    assert torch.equal(a.videos, b.videos) and a.videos.shape == (7, 1, 3, 16, 16)
    smaller = MovingDigits(frames=3).batch(3, size=2, seed=5)
    assert torch.equal(smaller.videos, a.videos[:2]) and torch.equal(smaller.labels, a.labels[:2])
    for step, seed in ((4, 5), (3, 6)):
        assert not torch.equal(task.batch(step, size=7, seed=seed).videos, a.videos)


def test_a_digit_moves_without_changing_and_stays_inside():
    task = MovingDigits(frames=25, size=13)
    digits = {image.numpy().tobytes() for image in task._train.images[:, 0]}
    videos, _ = task.batch(0, size=5, seed=0)
    for video in videos[:, 0]:
        before = None
        for frame in video:
            corners = [
                (y, x)
                for y in range(6)
                for x in range(6)
                if frame[y : y + 8, x : x + 8].contiguous().numpy().tobytes() in digits
                and (frame + 1).sum() == (frame[y : y + 8, x : x + 8] + 1).sum()
            ]
            assert corners
            if before is not None:
                assert any(abs(y - v) <= 3 and abs(x - u) <= 3 for y, x in corners for v, u in before)
            before = corners
    assert len({v.numpy().tobytes() for v in videos[0, 0]}) > 3


def test_held_out_digits_are_not_trained_on():
    task = MovingDigits(frames=1, size=8)
    seen = {v.numpy().tobytes() for v in task.batch(0, size=3000, seed=1).videos}
    held = task.all().videos
    assert len(held) == 128 and not seen & {v.numpy().tobytes() for v in held}
    assert torch.equal(torch.cat([b.videos for b in task.held_out_batches(50)]), held)
    assert len(task.held_out_documents()) == 128


def test_pieces_put_together_are_the_batch():
    batch = MovingDigits(frames=2).batch(0, size=7, seed=0)
    pieces = batch.pieces(3)
    assert torch.equal(torch.cat([p.videos for p in pieces]), batch.videos)
    assert torch.equal(batch.weights(), torch.ones(7)) and isinstance(batch.to("cpu"), Batch)


def test_evaluation_gives_the_error_and_decibels():
    task = MovingDigits(frames=5, held_out=9)
    model = cosmos_tokenizer().build(task.task_spec).eval()
    found = task.evaluate(model, cosmos_tokenizer["objective"])
    videos = task.all().videos
    with torch.no_grad():
        made = model(videos).pixels
    torch.testing.assert_close(found.score, (made - videos).square().mean().item(), rtol=1e-4, atol=0)
    assert found.metrics["psnr"] == pytest.approx(decibels((made - videos).square().mean().item()), rel=1e-4)
    assert len(found.values) == 9
    assert (
        MovingDigits(frames=5).fingerprint != MovingDigits(frames=6).fingerprint == MovingDigits(frames=6).fingerprint
    )


@pytest.mark.parametrize(
    ("given", "word"), [({"frames": 0}, "frames"), ({"size": 7}, "size"), ({"frames": 2.0}, "frames")]
)
def test_moving_digits_refuse(given, word):
    with pytest.raises(UserError, match=f"{word} must be a whole number of at least"):
        MovingDigits(**given)


# Cubes and wavelets


def test_cubes_are_cut_and_put_back():
    video = torch.randn(2, 3, 4, 6, 10)
    cut = cubed(video, (2, 3, 5))
    assert cut.shape == (2, 3 * 30, 2, 2, 2)
    assert torch.equal(cut[1, :30, 1, 0, 1], video[1, 0, 2:, :3, 5:].flatten())
    assert torch.equal(uncubed(cut, (2, 3, 5)), video)
    assert torch.equal(as_maps(as_stream(video), (4, 6, 10)), video)
    with pytest.raises(UserError, match="4 x 6 x 10 is not made of cubes of 3 x 3 x 5"):
        cubed(video, (3, 3, 5))


@pytest.mark.parametrize("patcher", [Haar, Cubes])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_patcher_gives_back_what_it_cut(patcher, frames):
    video = torch.randn(2, 3, frames, 8, 4, dtype=torch.float64)
    bands = patcher(levels=2).cut(video)
    assert bands.shape == (2, 192, 1 + (frames - 1) // 4, 2, 1)
    torch.testing.assert_close(patcher(levels=2).join(bands), video)


@pytest.mark.parametrize("patcher", [Haar, Cubes])
def test_a_patcher_refuses_frames_that_do_not_group(patcher):
    with pytest.raises(UserError, match=r"8 frames are not 1 \+ a multiple of 4"):
        patcher().cut(torch.randn(1, 1, 8, 8, 8))


def test_wavelets_refuse_what_does_not_halve():
    with pytest.raises(UserError, match="an axis of 6 does not halve 2 times"):
        analysed(torch.randn(1, 1, 8, 6))
    with pytest.raises(UserError, match="an axis of 10"):
        haar_wavelet_tokenizer(torch.randn(1, 1, 5, 8, 10))
    none = torch.randn(2, 3, 5, 7)
    assert torch.equal(synthesised(analysed(none, levels=0), levels=0), none)


# Space and time


def test_a_stream_without_a_grid_is_no_video():
    mixer = WithinFrames(8, inner=part(Attention, heads=2))
    with pytest.raises(UserError, match="no video without its grid"):
        mixer(torch.randn(1, 6, 8), Context())
    with pytest.raises(UserError, match="not made of frames of 4 patches"):
        AlongTime(8, inner=part(Attention, heads=2))(torch.randn(1, 6, 8), Context(grid=(2, 2)))


def test_vivit_looks_both_ways():
    recipe = vit + vitok
    ahead, back = recipe + factorized_spacetime(mask=part(everywhere)), recipe + factorized_spacetime
    assert ahead != back and back == recipe + factorized_spacetime(mask=part(causal))
    video = torch.randn(1, 1, 8, 8, 8)
    later = torch.cat([video[:, :, :4], -video[:, :, 4:]], 2)
    for each, same in ((ahead, False), (back, True)):
        torch.manual_seed(0)
        model = each().build({"channels": 1}).eval()
        first = lambda v, model=model: model.encode(v).latent[:, :, 0]
        assert torch.allclose(first(video), first(later), atol=1e-5) == same


def test_a_strided_convolution_over_the_past_keeps_the_first_frame():
    conv = PastConv(2, 3, stride=2)
    video = torch.randn(1, 2, 7, 2, 2)
    out = conv(video)
    assert out.shape == (1, 3, 4, 2, 2)
    torch.testing.assert_close(conv(video[:, :, :1]), out[:, :, :1])
    torch.testing.assert_close(out[:, :, 3], nn_time(conv, video[:, :, 4:7]))


def nn_time(conv, frames):
    return torch.einsum("bctyx,dct->bdyx", frames, conv.weight[..., 0, 0]) + conv.bias[:, None, None]


def test_heads_too_narrow_for_three_axes_are_refused():
    assert groups(6) == (2, 2, 2) and groups(16) == (8, 4, 4) and groups(18) == (6, 6, 6)
    for width in (4, 7):
        with pytest.raises(UserError, match=f"heads of {width} features"):
            Rotary3D(width, rows=2, columns=2)


def test_a_frame_at_half_the_rate_stands_twice_as_far():
    x, at = torch.randn(1, 12, 2, 12), torch.arange(12)
    slow = Rotary3D(12, rows=1, columns=3, rate=2.0)(x, at)
    fast = Rotary3D(12, rows=1, columns=3)(x, 2 * (at // 3) * 3 + at % 3)
    torch.testing.assert_close(slow, fast)
    assert turns(torch.zeros(3, 3), 12).shape == (3, 6)


def test_cubes_stand_in_a_larger_room():
    places = unravelled(standing((2, 2, 3)), (0, 1024, 1024))
    assert places.tolist() == [[t, y, x] for t in range(2) for y in range(2) for x in range(3)]


# Bottlenecks


def test_a_codebook_keeps_its_entries_and_a_moving_one_only_moves_in_training():
    latent = torch.randn(3, 4, 5)
    for book in (Codebook(codes=6, width=4), MovingCodebook(codes=6, width=4)):
        before = book.table.clone()
        passed = book.eval()(latent)
        assert torch.equal(book.table, before) and passed.codes.shape == (3, 5)
        entries = book.table[passed.codes].movedim(-1, 1)
        torch.testing.assert_close(passed.latent, entries)
    moved = book.train()
    moved(latent)
    assert not torch.equal(moved.table, before)
    assert nearest(before, before).tolist() == list(range(6))


def test_usage_counts_entries_and_their_evenness():
    assert usage(torch.tensor([[0, 0], [0, 0]]), 4) == (0.25, pytest.approx(1.0))
    assert usage(torch.arange(4), 4) == (1.0, pytest.approx(4.0))


@pytest.mark.parametrize("levels", [(), (1,), (5, 0), (2.0,)])
def test_fsq_refuses_levels(levels, unchecked):
    with pytest.raises(UserError, match="at least 2"):
        FSQ(levels=levels)


def test_bottlenecks_say_how_wide_they_are():
    for bottleneck, enters, leaves in (
        (NoBottleneck(width=3), 3, 3),
        (Gaussian(width=3), 6, 3),
        (FSQ(levels=(5, 5)), 2, 2),
    ):
        assert (bottleneck.enters, bottleneck.leaves) == (enters, leaves)
        passed = bottleneck(torch.randn(2, enters, 4))
        assert passed.latent.shape == (2, leaves, 4) and passed.cost.shape == (2,)


def test_images_must_halve():
    with pytest.raises(UserError, match="do not halve 2 times"):
        ConvEncoder(1, 4)(torch.randn(1, 1, 6, 8))


def test_errors_are_means_over_pixels():
    said, true = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 2.0)
    assert squared(said, true).tolist() == [4, 4] and absolute(said, true).tolist() == [2, 2]
    assert decibels(4.0) == 0 and decibels(0.04) == pytest.approx(20) and decibels(0.0) == float("inf")
    model = Autoencoder(1, encoder=part(ConvEncoder), bottleneck=part(NoBottleneck), decoder=vq_vae["model.decoder"])
    images = torch.randn(3, 1, 8, 8)
    batch = type("Batch", (), {"images": images})
    torch.testing.assert_close(rebuild(model, batch), squared(model(images).pixels, images))


# Whole tokenizers


def test_cosmos_refuses_videos_that_do_not_become_a_latent():
    encoder = CosmosEncoder(1, 4, widths=(4, 4, 4), factors=((1, 2),))
    with pytest.raises(UserError, match=r"9 x 12 x 16 does not become a latent.*multiple of 4 frames.*multiples of 8"):
        encoder(torch.randn(1, 1, 9, 12, 16))
    with pytest.raises(UserError, match="take at least 4 widths, not 2"):
        CosmosDecoder(4, 1, factors=((2, 2), (1, 2)))
    with pytest.raises(UserError, match="a pair of 1 or 2"):
        CosmosEncoder(1, 4, factors=((3, 1),))


def test_a_continuous_tokenizer_and_a_discrete_one_differ_by_fsq():
    recipe = cosmos_tokenizer + fsq(levels=(8, 5))
    model = recipe().build({"channels": 1})
    passed = model.encode(torch.randn(1, 1, 9, 16, 16))
    assert passed.latent.shape == (1, 2, 3, 4, 4) and passed.codes.shape == (1, 3, 4, 4)
    assert cosmos_tokenizer().build({"channels": 1}).encode(torch.randn(1, 1, 9, 16, 16)).codes is None


def test_vitok_refuses_videos_that_are_no_cubes():
    model = (vit + vitok)().build({"channels": 1})
    with pytest.raises(UserError, match="not made of cubes of 4 x 4 x 4"):
        model.encode(torch.randn(1, 1, 7, 8, 8))
    assert floats((8, 16, 16), (4, 4, 4), 8) == 256
    assert isinstance(model.encoder, CubeEncoder) and len(model.decoder.stack.blocks) == 4


def test_frames_are_drawn():
    task = MovingDigits(frames=5)
    assert len(film(task.all().videos[:3], cosmos_tokenizer().build(task.task_spec).eval()).axes) == 2 * 3 * 5
