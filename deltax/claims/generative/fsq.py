"""Claims of fsq: the paper's equations, parity with peers, and what it measures."""

import itertools
import math

import torch

from deltax import claim
from deltax.claims.generative.vq_vae import told
from deltax.papers.generative.fsq import FSQ, MARGIN
from deltax.papers.generative.vq_vae import usage


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
