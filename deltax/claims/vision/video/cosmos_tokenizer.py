"""Claims of cosmos-tokenizer: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.claims.checking import assert_equal, gradients, randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.generative.fsq import fsq
from deltax.papers.vision.video.cosmos_tokenizer import CosmosDecoder, CosmosEncoder, cosmos_tokenizer
from deltax.papers.vision.video.haar_wavelet_tokenizer import Haar
from deltax.parts.model.autoencoder import Autoencoder, NoBottleneck
from deltax.parts.model.videos import Cubes, film
from deltax.weights.vision.video.cosmos_tokenizer import from_hf


@claim
def the_first_latent_is_that_of_the_picture():
    """The latent of a video's first frame is what the frame alone gives, later frames change no earlier latent, and
    decoded latents change no earlier frame; with the gradients to the pixels."""
    model, video = _tiny()
    latent = model.encode(video).latent
    assert latent.shape == (2, 3, 3, 2, 1)
    first = model.encode(video[:, :, :1]).latent
    torch.testing.assert_close(latent[:, :, :1], first)
    torch.testing.assert_close(model.encode(video[:, :, :5]).latent, latent[:, :, :2])
    weight = torch.randn_like(first)
    slopes = [torch.autograd.grad((y * weight).sum(), video)[0] for y in (latent[:, :, :1], first)]
    torch.testing.assert_close(*slopes)
    assert slopes[0][:, :, 0].any() and not slopes[0][:, :, 1:].any()
    frames = model.decode(latent)
    torch.testing.assert_close(model.decode(first), frames[:, :, :1])
    torch.testing.assert_close(model.decode(latent[:, :, :2]), frames[:, :, :5])


@claim
def rates_are_products():
    """A latent stands for as many frames, rows and columns as the patch times all factors, and the decoder gives back
    as many as there were, a picture being one frame."""
    for levels, factors in ((1, ((2, 2),)), (2, ((1, 2),)), (0, ((2, 1), (2, 2)))):
        parts = {"widths": (4,) * (len(factors) + 2), "factors": factors, "patcher": part(Haar, levels=levels)}
        model = Autoencoder(
            2,
            encoder=part(CosmosEncoder, **parts),
            bottleneck=part(NoBottleneck, width=3),
            decoder=part(CosmosDecoder, **parts),
        )
        time, plane = model.encoder.patch
        for frames in (1, 1 + 2 * time):
            video = torch.randn(1, 2, frames, 2 * plane, plane)
            made = model(video)
            assert made.passed.latent.shape == (1, 3, 1 + (frames - 1) // time, 2, 1)
            assert made.pixels.shape == video.shape


@claim
def rounded_it_is_the_discrete_tokenizer():
    """With FSQ in its bottleneck it gives whole numbers below 64000 for the paper's levels, and what is decoded from
    these numbers alone is what the tokenizer gives."""
    recipe = cosmos_tokenizer + fsq(levels=(8, 8, 8, 5, 5, 5))
    model = randomise(recipe().build({"channels": 1}))
    video = torch.randn(2, 1, 5, 8, 4, dtype=torch.float64)
    made = model(video)
    codes = made.passed.codes
    assert codes.shape == (2, 2, 2, 1) and codes.min() >= 0 and codes.max() < 64_000
    torch.testing.assert_close(model.decode(model.bottleneck.latent(codes).double()), made.pixels)


@claim.parity(peer="diffusers AutoencoderKLCosmos")
def equals_diffusers():
    """The same random weights give diffusers' latents, videos and gradients, of a video and of a picture, with
    attention at one resolution and other rates in time than in space."""
    from diffusers import AutoencoderKLCosmos

    theirs = AutoencoderKLCosmos(
        in_channels=2, out_channels=2, latent_channels=3, encoder_block_out_channels=(4, 6, 8, 8),
        decode_block_out_channels=(6, 8, 4, 8), attention_resolutions=(4,), resolution=16, num_layers=2, patch_size=2,
        spatial_compression_ratio=8, temporal_compression_ratio=4, latents_mean=[0.0], latents_std=[1.0],
    )  # fmt: skip
    randomise(theirs)
    for patcher in (theirs.encoder.patch_embed, theirs.decoder.unpatch_embed):
        patcher.wavelets.fill_(0.5**0.5)  # they were float32
    shared = {"depth": 2, "factors": ((2, 2), (1, 2)), "attentive": (1,), "patcher": part(Haar, levels=1)}
    ours = Autoencoder(
        2,
        encoder=part(CosmosEncoder, widths=(4, 6, 8, 8), **shared),
        bottleneck=part(NoBottleneck, width=3),
        decoder=part(CosmosDecoder, widths=(6, 8, 4, 8), **shared),
    ).double()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    for frames in (5, 1):
        video = torch.randn(2, 2, frames, 16, 8, dtype=torch.float64)
        made, peer = ours(video), theirs(video).sample
        torch.testing.assert_close(made.passed.latent, theirs.encode(video).latent_dist.mode())
        same_gradients(made.pixels, peer)
    assert_equal(gradients(ours), from_hf(gradients(theirs)))


@claim.measured(paper="the wavelets let the tokenizer begin on what is not redundant (section 4.1)")
def wavelets_draw_better_than_pixels(lab):
    """Trained alike at equal compute, the tokenizer reconstructs held-out videos of moving digits at least 0.2 dB
    better from wavelets than from cubes of pixels, after 700 steps of 16."""
    gains, numbers, figures = [], {}, {}
    for seed in lab.seeds(3):
        found = {}
        for name, patcher in (("wavelets", Haar), ("pixels", Cubes)):
            run = lab.train(cosmos_tokenizer.fill("patcher", patcher), seed=seed)
            found[name] = run.evaluation.metrics["psnr"]
            numbers.setdefault(f"{name}: dB", []).append(found[name])
            if name == "wavelets" and not figures:
                figures = {
                    "Frames, and what 192 numbers make of all nine": lab.figure(
                        film(run.task.all().videos[:4], run.model)
                    )
                }
        gains.append(found["wavelets"] - found["pixels"])
    return lab.at_least(gains, 0.2, unit="dB", numbers=numbers, figures=figures)


def _tiny() -> tuple[nn.Module, Tensor]:
    """A tokenizer with attention at both levels, all parameters random, and a video that wants gradients."""
    small = {"widths": (4, 6, 6), "factors": ((2, 2),), "attentive": (0,)}
    recipe = paper_of(cosmos_tokenizer)(width=3, levels=1).set(CosmosEncoder, **small).set(CosmosDecoder, **small)
    model = randomise(recipe().build({"channels": 1}))
    return model, torch.randn(2, 1, 9, 8, 4, dtype=torch.float64, requires_grad=True)
