"""Denoising Diffusion Implicit Models. Song, Meng, Ermon, 2020. arXiv:2010.02502

DDPM, but the steps back need not be a Markov chain: with the same marginals and no fresh noise, steps can be skipped.

The network is left as it was trained. From a noised image it gives the data and the noise; put them together again at
any lower level and that is a step. eta says how much of the noise is drawn anew: all that DDPM draws at 1, none at 0.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from deltax import claim, paper
from deltax.papers.generative.ddpm import STEPS, ddpm, posterior, signal


@paper(on=ddpm, year=2020, arxiv="2010.02502")
def ddim(noise_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, evaluations: int = 50, eta: float = 0.0) -> Tensor:
    """Images from noise x (B, ...) by so many calls of noise_of(x, times).

    Times are (B,) in [0, 1], as DDPM's network has them. Steps are spaced evenly from 1000, all noise, to 0 (Eq. 12).
    """
    steps = torch.linspace(STEPS, 0, evaluations + 1, dtype=torch.float64).round().long()
    abar = signal().to(x)
    for now, then in pairwise(steps):
        noise = noise_of(x, (now / STEPS).to(x).expand(len(x)))
        x = step(x, noise, abar[now], abar[then], eta=eta)
    return x


def step(x: Tensor, noise: Tensor, now: Tensor, then: Tensor, *, eta: float = 0.0) -> Tensor:
    """From the level abar = `now` to `then`, both scalars, given the noise in x (Eq. 12)."""
    data = (x - (1 - now).sqrt() * noise) / now.sqrt()
    fresh = eta * ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0).sqrt()
    x = then.sqrt() * data + (1 - then - fresh.square()).clamp(min=0).sqrt() * noise
    return x + fresh * torch.randn_like(x) if eta else x


@claim
def eta_one_is_ddpm():
    """With eta = 1 and no step skipped, a step draws from DDPM's posterior: the same mean, the same variance."""
    torch.manual_seed(0)
    abar = signal()
    x, noise = torch.randn(2, 1, 40_000, dtype=torch.float64)
    x, noise = x[:, :1].expand_as(x), noise[:, :1].expand_as(noise)
    for t in (2, 40, 1000):
        data = (x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt()
        mean, variance = posterior(data, x, abar[[t - 1]], abar[[t]])
        torch.manual_seed(t)
        ours = step(x, noise, abar[t], abar[t - 1], eta=1.0)
        torch.manual_seed(t)
        torch.testing.assert_close(ours, mean + variance.sqrt() * torch.randn_like(x), rtol=1e-9, atol=1e-9)


@claim
def steps_join():
    """Where the network names the same data each time, two steps are one: the interpolant is consistent with itself."""
    torch.manual_seed(0)
    abar = signal()
    data, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    at = lambda t: abar[t].sqrt() * data + (1 - abar[t]).sqrt() * noise
    x = at(900)
    named = lambda x, t: (x - abar[t].sqrt() * data) / (1 - abar[t]).sqrt()
    half = step(x, named(x, 900), abar[900], abar[300])
    torch.testing.assert_close(step(half, named(half, 300), abar[300], abar[20]), step(x, noise, abar[900], abar[20]))
    torch.testing.assert_close(half, at(300), rtol=1e-12, atol=1e-12)


@claim
def it_is_euler():
    """In x / sqrt(abar) against sqrt(1 / abar - 1), a step is Euler's for a slope that is the noise (section 4.3)."""
    torch.manual_seed(0)
    abar = signal()
    x, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    for now, then in ((1000, 800), (500, 499), (30, 1)):
        ratio = lambda t: (1 / abar[t] - 1).sqrt()
        euler = abar[then].sqrt() * (x / abar[now].sqrt() + (ratio(then) - ratio(now)) * noise)
        torch.testing.assert_close(step(x, noise, abar[now], abar[then]), euler, rtol=1e-12, atol=1e-12)


@claim.parity(peer="diffusers DDIMScheduler")
def equals_diffusers():
    """With the same network, whole samples and their gradients equal diffusers' over the same steps, for eta = 0."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    settings = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"}
    peer = DDIMScheduler(num_train_timesteps=STEPS, set_alpha_to_one=True, **settings)
    peer.set_timesteps(8)
    weight = torch.randn(5, 5) / 3
    network = lambda x, times: torch.tanh(x @ weight + times[:, None])
    x = torch.randn(3, 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ddim(network, ours, evaluations=8), theirs
    for t in peer.timesteps:
        b = peer.step(network(b, ((t + 1) / STEPS).expand(3)), t, b, eta=0.0).prev_sample
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    gradients = (torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((a, ours), (b, theirs)))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
