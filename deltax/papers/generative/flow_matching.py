"""Flow Matching for Generative Modeling. Lipman, Chen, Ben-Hamu, Nickel, Le, 2022. arXiv:2210.02747

A continuous normalizing flow, but never simulated in training: the network regresses the velocity of a given path.

The velocity that carries all noise to all data cannot be computed, but the one that carries noise to a single image
can, and the regressions on either have the same gradient (Theorem 2). On the straight path of section 4.1 it is a
constant. Straight ways to single images do not make the flow straight: paths that would cross bend instead.

Time here is the paper's: 0 is noise, 1 is data. Diffusion's is t' = 1 - t, with velocity -v; `diffusers` uses that one.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import NOISE_TO_IMAGES, needs
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.model.denoiser import Denoiser, PixelBlock, Pixels
from deltax.parts.numerics.counts import at_least
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import PerExample
from deltax.tasks.images.digits import DigitDrawings

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), times (B,)) -> (B, ...)


def straight(noise: Tensor, data: Tensor, times: PerExample, *, smallest: float = 0.0) -> tuple[Tensor, Tensor]:
    """Where the path from noise to data is at each time, and its velocity (Eqs. 22 and 23). All (B, ...), times (B,).

    It ends at the data, or, with `smallest`, in a Gaussian of that deviation around it.
    """
    t = times.view(-1, *[1] * (data.ndim - 1))
    return (1 - (1 - smallest) * t) * noise + t * data, data - (1 - smallest) * noise


@needs("images", "labels", model=NOISE_TO_IMAGES)
def conditional_flow_matching(model: nn.Module, batch: Any, *, smallest: float = 0.0) -> PerExample:
    """Squared error of the velocity (Eq. 23), a mean over pixels, at a time and a noise drawn for each image."""
    images = batch.images
    times = torch.rand(len(images), device=images.device)
    x, velocity = straight(torch.randn_like(images), images, times, smallest=smallest)
    return (model(x, times, batch.labels) - velocity).square().mean((1, 2, 3))


def euler(velocity: Velocity, x: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """One step from `now` to `then` along the velocity at the start: one evaluation, first order."""
    return x + (then - now) * velocity(x, now.expand(len(x)))


def midpoint(velocity: Velocity, x: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """One step along the velocity half-way: two evaluations, second order."""
    half = euler(velocity, x, now, (now + then) / 2)
    return x + (then - now) * velocity(half, ((now + then) / 2).expand(len(x)))


def heun(velocity: Velocity, x: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """One step along the mean of the velocities at both ends: two evaluations, second order."""
    first = velocity(x, now.expand(len(x)))
    last = velocity(x + (then - now) * first, then.expand(len(x)))
    return x + (then - now) * (first + last) / 2


def sample(velocity: Velocity, noise: Tensor, *, steps: int = 16, solver: Callable[..., Tensor] = euler) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from noise (B, ...) at t = 0 to data at t = 1 in equal steps.

    A model is a velocity; to draw a given class, sample `lambda x, t: model(x, t, labels)`. Raises UserError for steps
    below one.
    """
    at_least(1, steps=steps)
    times = torch.linspace(0, 1, steps + 1, dtype=noise.dtype, device=noise.device)
    for now, then in pairwise(times):
        noise = solver(velocity, noise, now, then)
    return noise


def data_of(velocity: Tensor, x: Tensor, times: PerExample, *, smallest: float = 0.0) -> Tensor:
    """E[data | x], the denoiser that a velocity at x amounts to; x + (1 - t) velocity where `smallest` is 0."""
    t = times.view(-1, *[1] * (x.ndim - 1))
    return (1 - smallest) * x + (1 - (1 - smallest) * t) * velocity


def marginal(data: Tensor, *, smallest: float = 0.0) -> Velocity:
    """The exact velocity for a finite data set (N, D), each point equally likely (Eq. 8).

    x (B, D), times (B,) -> (B, D). With `smallest` 0 it has no value at t = 1.
    """

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        t = times[:, None]
        width = 1 - (1 - smallest) * t
        distance = (x[:, None] - t[:, None] * data).square().sum(-1)
        expected = torch.softmax(-distance / (2 * width.square()), -1) @ data
        return (expected - (1 - smallest) * x) / width

    return velocity


@paper(year=2022, arxiv="2210.02747")
def flow_matching(*, dim: int = 192, depth: int = 3, smallest: float = 0.0) -> Part:
    body = part(Pixels, depth=depth, block=part(PixelBlock, norm=LayerNorm), norm=LayerNorm)
    return part(
        Run,
        model=part(Denoiser, dim=dim, body=body),
        task=DigitDrawings,
        objective=part(conditional_flow_matching, smallest=smallest),
        batches=from_task,
        optimizer=part(adamw, lr=2e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=128, steps=1200),
    )
