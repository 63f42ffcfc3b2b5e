"""Denoising Diffusion Implicit Models. Song, Meng, Ermon, 2020. arXiv:2010.02502

DDPM, but the steps back need not be a Markov chain: with the same marginals and no fresh noise, steps can be skipped.

The network is left as it was trained. From a noised image it gives the data and the noise; put them together again at
any lower level and that is a step. eta says how much of the noise is drawn anew: all that DDPM draws at 1, none at 0.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.generative.ddpm import STEPS, ddpm, signal
from deltax.parts.numerics.counts import between


@paper(on=ddpm, year=2020, arxiv="2010.02502")
def ddim(noise_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, evaluations: int = 50, eta: float = 0.0) -> Tensor:
    """Images from noise x (B, ...) by so many calls of noise_of(x, times).

    Times are (B,) in [0, 1], as DDPM's network has them. Steps are spaced evenly from 1000, all noise, to 0 (Eq. 12).
    Raises UserError for more evaluations than these steps, or fewer than one.
    """
    between(1, STEPS, evaluations=evaluations)
    steps = torch.linspace(STEPS, 0, evaluations + 1, dtype=torch.float64).round().long()
    abar = signal().to(x)
    for now, then in pairwise(steps):
        noise = noise_of(x, (now / STEPS).to(x).expand(len(x)))
        x = step(x, noise, abar[now], abar[then], eta=eta)
    return x


def encode(noise_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, evaluations: int = 50) -> Tensor:
    """The noise that an image x (B, ...) came from: the steps turned round, each with the noise named where it began
    (section 4.3). No step begins at the image itself, where there is no noise to name: the first is at 1 of 1000.

    Raises UserError for more evaluations than 1000, or fewer than one.
    """
    between(1, STEPS, evaluations=evaluations)
    steps = torch.linspace(0, STEPS, evaluations + 1, dtype=torch.float64).round().long()
    abar = signal().to(x)
    for now, then in pairwise(steps):
        noise = noise_of(x, (now.clamp(min=1) / STEPS).to(x).expand(len(x)))
        x = step(x, noise, abar[now], abar[then])
    return x


def step(x: Tensor, noise: Tensor, now: Tensor, then: Tensor, *, eta: float = 0.0) -> Tensor:
    """From the level abar = `now` to `then`, both scalars, given the noise in x (Eq. 12)."""
    data = (x - (1 - now).sqrt() * noise) / now.sqrt()
    fresh = eta * ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0).sqrt()
    x = then.sqrt() * data + (1 - then - fresh.square()).clamp(min=0).sqrt() * noise
    return x + fresh * torch.randn_like(x) if eta else x
