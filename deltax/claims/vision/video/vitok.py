"""Claims of vitok: the paper's equations, parity with peers, and what it measures."""

import numpy as np
import torch
from torch import Tensor, nn

from deltax import Part, claim, part
from deltax.claims.checking import randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.video.factorized_spacetime import factorized_spacetime
from deltax.papers.vision.video.vitok import ROOM, floats, standing, vitok
from deltax.parts.attention.context import Context
from deltax.parts.model.autoencoder import Gaussian, NoBottleneck, divergence
from deltax.parts.model.videos import Cube, as_maps, as_stream, cubed, uncubed
from deltax.tasks.images.videos import MovingDigits


@claim
def one_convolution_goes_in_and_one_comes_out():
    """Embedding cubes is a 3-D convolution of that size and stride, and the last map to pixels its transpose, the
    gradients too; and cutting loses nothing."""
    model, video = _tiny()
    cube, coder = (2, 2, 3), model.encoder
    conv = nn.Conv3d(2, 12, cube, stride=cube).double()
    conv.load_state_dict({"weight": coder.embed.weight.unflatten(1, (2, *cube)), "bias": coder.embed.bias})
    same_gradients(coder.embed(as_stream(cubed(video, cube))), as_stream(conv(video)))
    torch.testing.assert_close(coder.embed.weight.grad, conv.weight.grad.flatten(1))
    assert torch.equal(uncubed(cubed(video, cube), cube), video)

    coder, x = model.decoder, torch.randn(2, 2 * 2 * 3, 12, dtype=torch.float64)
    transposed = nn.ConvTranspose3d(12, 2, cube, stride=cube, bias=False).double()
    transposed.load_state_dict({"weight": coder.leave.weight.mT.unflatten(1, (2, *cube))})
    coder.leave.bias.data.zero_()
    same_gradients(uncubed(as_maps(coder.leave(x), (2, 2, 3)), cube), transposed(as_maps(x, (2, 2, 3))))
    torch.testing.assert_close(coder.leave.weight.grad, transposed.weight.grad.flatten(1).mT)


@claim
def the_latent_has_so_many_floats():
    """A latent holds cubes times channels, E, whatever the size of the video that one model reads: eight times smaller
    cubes with an eighth of the channels hold as many."""
    for cube, width in (((2, 4, 4), 8), ((1, 2, 2), 1), ((4, 2, 4), 8)):
        model = _recipe(cube=cube, width=width)().build({"channels": 1})
        for size in ((4, 8, 8), (8, 4, 12)):
            latent = model.encode(torch.randn(1, 1, *size)).latent
            assert latent.numel() == floats(size, cube, width)
    assert floats((4, 8, 8), (2, 4, 4), 8) == floats((4, 8, 8), (1, 2, 2), 1)


@claim
def nothing_knows_where_the_video_begins():
    """Cubes know their places only from one another: moved together in time, rows and columns, they give the same."""
    model, video = _tiny()
    coder = model.encoder
    x, at = coder.embed(as_stream(cubed(video, (2, 2, 3)))), standing((2, 2, 3))
    moved = at + (5 * ROOM + 7) * ROOM + 30
    here, there = (coder.stack(x, Context(positions=p)) for p in (at, moved))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(coder.stack(x, Context(positions=at.flip(0) * 3)), here, rtol=1e-2)


@claim
def every_frame_sees_every_other():
    """The first latent changes with the last frame; with factorised, causal space and time in both halves it does not,
    nor does the first frame that is decoded."""
    model, video = _tiny()
    later = torch.cat([video[:, :, :2], torch.randn_like(video[:, :, 2:])], 2)
    assert not torch.allclose(model.encode(later).latent[:, :, 0], model.encode(video).latent[:, :, 0])
    recipe = _recipe() + factorized_spacetime
    model = randomise(recipe().build({"channels": 2})).eval()
    torch.testing.assert_close(model.encode(later).latent[:, :, 0], model.encode(video).latent[:, :, 0])
    torch.testing.assert_close(model(later).pixels[:, :, :2], model(video).pixels[:, :, :2])


@claim
def the_mean_alone_is_a_plain_autoencoder():
    """In evaluation the latent is the mean, and its floats decoded are what a plain autoencoder of the same weights
    gives; in training it is drawn, with that mean and variance."""
    model, video = _tiny()
    plain = _recipe().put("model.bottleneck", part(NoBottleneck, width=3))().build({"channels": 2}).double()
    weights = model.state_dict()
    weights["encoder.leave.weight"], weights["encoder.leave.bias"] = (
        weights[f"encoder.leave.{name}"][:3] for name in ("weight", "bias")
    )
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(video).pixels, model(video).pixels)
    said = torch.tensor([0.5, -1.0, 0.3, -1.2]).view(1, 4, 1).expand(1, 4, 100_000).double()
    drawn = Gaussian(width=2).train()(said).latent
    torch.testing.assert_close(drawn.mean(-1), said[:, :2, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.var(-1).log(), said[:, 2:, 0], rtol=0, atol=0.03)


@claim.parity(peer="torch.distributions kl_divergence")
def equals_torch():
    """What the bottleneck charges is the divergence that torch gives, with gradients, a mean over the latent's floats
    times its weight."""
    from torch.distributions import Normal, kl_divergence

    torch.manual_seed(0)
    said = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    mean, log_variance = said.chunk(2, 1)
    theirs = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mean, log_variance), theirs)
    ours = Gaussian(width=3, weight=0.7)(said).cost
    torch.testing.assert_close(ours, 0.7 * theirs.flatten(1).mean(1))
    weight = torch.randn_like(ours)
    slopes = (torch.autograd.grad((y * weight).sum(), said)[0] for y in (ours, 0.7 * theirs.flatten(1).mean(1)))
    torch.testing.assert_close(*slopes)


@claim.measured(paper="reconstruction follows the logarithm of E, whatever cubes and channels it is made of (Figure 3)")
def floats_decide_reconstruction(lab):
    """Over patches of 1, 2 and 4 pixels and channels for E from 8 to 64, a line in log E explains at least 80 % of the
    variance of the log error of held-out digits."""
    shares, numbers = [], {"E": [e for e, _, _ in GRID], "patch": [p for _, p, _ in GRID]}
    for seed in lab.seeds(3):
        found = [_decibels(lab, seed, cube=(1, patch, patch), width=width) for _, patch, width in GRID]
        numbers.setdefault("dB", []).append(found)
        shares.append(100 * np.corrcoef(np.log([e for e, _, _ in GRID]), found)[0, 1] ** 2)
    figure = lab.figure(_line(numbers))
    return lab.at_least(shares, 80.0, unit="percent of variance", numbers=numbers, figures={"Error against E": figure})


@claim.measured(paper="scaling the encoder gives no gain in reconstruction (abstract)")
def a_deeper_encoder_does_not_help(lab):
    """At E = 32, four blocks in the encoder reconstruct at most 0.3 dB better than one, over decoders of one, two and
    four blocks."""
    table = _table(lab)
    gains = [float(np.mean(each[2] - each[0])) for each in table]
    return lab.at_most(gains, 0.3, unit="dB", numbers={"dB, encoder by decoder": table.tolist()})


@claim.measured(paper="scaling the decoder improves reconstruction (abstract)")
def a_deeper_decoder_helps(lab):
    """At E = 32, four blocks in the decoder reconstruct at least 0.3 dB better than one, over encoders of one, two and
    four blocks."""
    table = _table(lab)
    gains = [float(np.mean(each[:, 2] - each[:, 0])) for each in table]
    return lab.at_least(gains, 0.3, unit="dB", numbers={"dB, encoder by decoder": table.tolist()})


GRID = [(e, patch, e * patch**2 // 64) for patch in (1, 2, 4) for e in (8, 16, 32, 64) if e * patch**2 >= 64]
DEPTHS = (1, 2, 4)


def _decibels(lab, seed: int, **options) -> float:
    """The PSNR of held-out digits, 8 x 8."""
    recipe = (vit + vitok(**options)).put("task", part(MovingDigits, frames=1, size=8))
    return lab.train(recipe, seed=seed, steps=300).evaluation.metrics["psnr"]


def _table(lab) -> np.ndarray:
    """Decibels by seed, depth of the encoder, depth of the decoder."""
    run = lambda seed, e, d: _decibels(lab, seed, cube=(1, 2, 2), width=2, encoder=e, decoder=d)
    return np.array([[[run(seed, e, d) for d in DEPTHS] for e in DEPTHS] for seed in lab.seeds(3)])


def _line(numbers: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3))
    ax = figure.subplots()
    mean = np.mean(numbers["dB"], 0)
    for patch in (1, 2, 4):
        chosen = [i for i, p in enumerate(numbers["patch"]) if p == patch]
        ax.plot([numbers["E"][i] for i in chosen], mean[chosen], marker="o", label=f"patch {patch}")
    ax.set(xscale="log", xlabel="floats in the latent, E", ylabel="PSNR, dB")
    ax.legend()
    return figure


def _recipe(*, cube: Cube = (2, 2, 3), width: int = 3) -> Part:
    return (paper_of(vit)(dim=12, heads=2) + vitok(cube=cube, width=width, encoder=1, decoder=2)).set(
        Attention, heads=2
    )


def _tiny() -> tuple[nn.Module, Tensor]:
    """A tokenizer in evaluation, all parameters random, and a video."""
    model = randomise(_recipe()().build({"channels": 2})).eval()
    return model, torch.randn(2, 2, 4, 4, 9, dtype=torch.float64)
