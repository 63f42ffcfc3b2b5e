"""Finite Scalar Quantization: VQ-VAE Made Simple. Mentzer, Minnen, Agustsson, Tschannen, 2023. arXiv:2309.15505

VQ-VAE, but with no codebook: each of a few numbers is squashed and rounded to one of its levels.

A learned codebook collapses, and is then kept alive by losses and tricks. A grid cannot collapse: its entries are all
combinations of levels, and whatever the encoder says lies next to one. The gradient goes straight through the rounding
and sees the tanh. With an even number of levels the grid has one more below zero than above. Shifted by atanh as here,
zero stays zero; the paper's listing shifts by tan, and so nearly.
"""

import itertools
import math

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax import Part, claim, paper
from deltax.errors import UserError
from deltax.papers.generative.vq_vae import straight_through, told, usage, vq_vae
from deltax.parts.autoencoder import Latent, Passed

MARGIN = 1e-3  # how far the outermost numbers lie beyond the last level, so that rounding cannot tie


def bounded(x: Tensor, levels: Tensor) -> Tensor:
    """Squashed to where rounding leaves L levels: odd L symmetric, even L from -L / 2 to L / 2 - 1. (..., D)."""
    half = (levels - 1) * (1 + MARGIN) / 2
    offset = (levels % 2 == 0) / 2
    return torch.tanh(x + torch.atanh(offset / half)) * half - offset


class FSQ(nn.Module):
    """Rounds each of len(levels) channels to its levels, in [-1, 1]. Latent (B, D, ...) -> the same, codes (B, ...).

    It charges nothing and learns nothing. The first channel counts fastest.
    """

    def __init__(self, *, levels: tuple[int, ...] = (8, 6, 5)):
        super().__init__()
        if not levels or any(type(n) is not int or n < 2 for n in levels):
            raise UserError(f"levels are whole numbers of at least 2, one for each channel, not {levels!r}")
        self.enters = self.leaves = len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.entries = math.prod(levels)

    def forward(self, latent: Latent) -> Passed:
        exact = torch.promote_types(latent.dtype, torch.float32)
        number = bounded(latent.movedim(1, -1).to(exact), self.levels)
        rounded = straight_through(number, number.round())
        out = (rounded / (self.levels // 2)).movedim(-1, 1).to(latent.dtype)
        return Passed(out, latent.new_zeros(len(latent)), self.codes(rounded))

    def codes(self, rounded: Tensor) -> Int64[Tensor, "..."]:
        """Each row of whole numbers (..., D) as one."""
        return ((rounded.detach().round() + self.levels // 2).long() * self.strides).sum(-1)

    def latent(self, codes: Int64[Tensor, "B ..."]) -> Latent:
        """What has these codes, (B, ...) -> (B, D, ...)."""
        number = codes[..., None] // self.strides % self.levels
        half = self.levels // 2
        return ((number - half) / half).movedim(-1, 1)


@paper(on=vq_vae, year=2023, arxiv="2309.15505")
def fsq(recipe: Part, *, levels: tuple[int, ...] = (8, 6, 5)) -> Part:
    return recipe.fill("bottleneck", FSQ, levels=levels)


@claim
def every_code_is_a_place_of_the_grid():
    """For any levels, codes are all numbers below their product, each of one place of the grid, there and back; and
    some latent rounds to each."""
    for levels in ((2,), (5, 4), (3, 2, 7), (8, 6, 5)):
        quantiser = FSQ(levels=levels)
        codes = torch.arange(quantiser.entries)
        places = quantiser.latent(codes)
        grid = itertools.product(*([(k - n // 2) / (n // 2) for k in range(n)] for n in reversed(levels)))
        torch.testing.assert_close(places, torch.tensor([point[::-1] for point in grid]))
        whole = (places * (quantiser.levels // 2)).double()
        offset = (quantiser.levels % 2 == 0) / 2
        half = (quantiser.levels - 1) * (1 + MARGIN) / 2
        before = torch.atanh((whole + offset) / half) - torch.atanh(offset / half)
        passed = quantiser(before)
        assert torch.equal(passed.codes, codes)
        torch.testing.assert_close(passed.latent, places.double())


@claim
def the_grid_cannot_be_left_and_zero_stays_zero():
    """However large, a number lands on the first or last of its levels, and 0 on 0."""
    for n in range(2, 10):
        quantiser = FSQ(levels=(n,))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = torch.tensor([-1e30, -1e9, -40.0, 0.0, 40.0, 1e9, 1e30], dtype=dtype)[:, None]
            passed = quantiser(x)
            assert passed.codes.tolist() == [0] * 3 + [n // 2] + [n - 1] * 3
            assert passed.latent[3].item() == 0 and passed.latent.dtype == dtype


@claim
def the_gradient_is_that_of_the_tanh():
    """Rounding lets through the slope of the squashing, half (1 - tanh^2) over the number of levels on a side."""
    torch.manual_seed(0)
    levels = (5, 4, 3)
    quantiser = FSQ(levels=levels)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    (slope,) = torch.autograd.grad((quantiser(x).latent * weight).sum(), x)
    for i, n in enumerate(levels):
        half, offset = (n - 1) * (1 + MARGIN) / 2, (n % 2 == 0) / 2
        tanh = torch.tanh(x[:, i] + math.atanh(offset / half))
        torch.testing.assert_close(slope[:, i], weight[:, i] * half * (1 - tanh.square()) / (n // 2))


@claim
def twice_is_not_once():
    """What has been rounded is squashed again when it is rounded again, so some codes become others."""
    quantiser = FSQ(levels=(8, 5))
    codes = torch.arange(quantiser.entries)
    assert not torch.equal(quantiser(quantiser.latent(codes)).codes, codes)


@claim.parity(peer="vector-quantize-pytorch FSQ")
def equals_vector_quantize():
    """Rounded latents, their codes, gradients, and what codes stand for equal theirs, with levels odd and even."""
    from vector_quantize_pytorch import FSQ as Theirs

    torch.manual_seed(0)
    for levels in ((8, 5, 5, 5), (7, 4, 3), (8, 8, 8, 5, 5, 5)):
        ours, theirs = FSQ(levels=levels), Theirs(levels=list(levels))
        x = (2 * torch.randn(2, len(levels), 7)).requires_grad_()
        passed, (peer, codes) = ours(x), theirs(x.mT)
        torch.testing.assert_close(passed.latent, peer.mT)
        assert torch.equal(passed.codes, codes.long())
        torch.testing.assert_close(ours.latent(passed.codes), theirs.indices_to_codes(codes).mT)
        weight = torch.randn_like(x)
        torch.testing.assert_close(
            *(torch.autograd.grad((y * weight).sum(), x)[0] for y in (passed.latent, peer.mT)), rtol=1e-4, atol=1e-5
        )


@claim.measured(paper="near 100 percent codebook use, which VQ loses as its codebook grows (Figure 3)")
def every_code_is_used(lab):
    """After training on digits, the training digits use at least 90 % of FSQ's 240 codes, four codes a digit."""
    shares, numbers = [], {}
    for seed in lab.seeds(3):
        _, codes = told(lab.train("vq-vae+fsq", seed=seed))
        share, perplexity = usage(codes, 240)
        shares.append(100 * share)
        numbers.setdefault("FSQ: perplexity", []).append(perplexity)
        _, codes = told(lab.train("vq-vae(codes=240)", seed=seed))
        share, perplexity = usage(codes, 240)
        numbers.setdefault("VQ: percent of codes used", []).append(100 * share)
        numbers.setdefault("VQ: perplexity", []).append(perplexity)
    return lab.at_least(shares, 90.0, unit="percent of the codes", numbers=numbers)


@claim.measured(paper="reconstruction on a par with VQ at equal codebooks, and better at large ones (Figure 3)")
def as_good_as_a_codebook(lab):
    """With 240 codes each, FSQ reconstructs held-out digits at most half a decibel worse than VQ."""
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        ours, _ = told(lab.train("vq-vae+fsq", seed=seed))
        theirs, _ = told(lab.train("vq-vae(codes=240)", seed=seed))
        gains.append(ours - theirs)
        numbers.setdefault("FSQ: dB", []).append(ours)
        numbers.setdefault("VQ: dB", []).append(theirs)
    return lab.at_least(gains, -0.5, unit="dB", numbers=numbers)
