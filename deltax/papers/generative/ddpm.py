"""Denoising Diffusion Probabilistic Models. Ho, Jain, Abbeel, 2020. arXiv:2006.11239

A latent-variable model, but its encoder is fixed, a thousand small noisings, and only the noise is learned.

The bound on the likelihood is a sum of squared errors with a weight for each step. Ho et al. drop the weights and ask
the network for the noise itself (Eq. 14); whatever the network is, one example at one step of the chain trains it.

Released code draws differently from Algorithm 2 as printed: the estimate of the data is clipped to [-1, 1] in every
step, the variance of a step back is that of the step forth ("fixedlarge", for CIFAR-10), and the network is an average
of its weights over training with decay 0.9999. `sample(largest=1.0, variance=large)` does the first two; no averages
are kept here. The two variances are the ends of what is right, the larger one where the data are N(0, 1), the smaller
one where they are a point (section 3.2); the paper has samples of like quality by both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.contract import NOISE_TO_IMAGES, needs
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.model.denoiser import Denoiser, PixelBlock, Pixels
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import PerExample
from deltax.tasks.images.digits import DigitDrawings

STEPS = 1000


def signal(*, steps: int = STEPS, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """abar_t, the share of variance that is still signal after t steps of variance from `first` to `last`, in float64.

    t counts from 0, where all is signal, to `steps`: (steps + 1,).
    """
    beta = torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


def noised(data: Tensor, noise: Tensor, abar: PerExample) -> Tensor:
    """sqrt(abar) data + sqrt(1 - abar) noise (Eq. 4). Tensors (B, ...) and abar (B,)."""
    abar = abar.view(-1, *[1] * (data.ndim - 1))
    return abar.sqrt() * data + (1 - abar).sqrt() * noise


def posterior(data: Tensor, x: Tensor, before: PerExample, now: PerExample) -> tuple[Tensor, PerExample]:
    """Mean and variance of x_{t-1} given x_t and the data (Eqs. 6, 7); abar is `before` at t - 1 and `now` at t."""
    alpha = now / before
    each = lambda v: v.view(-1, *[1] * (x.ndim - 1))
    mean = each(before.sqrt() * (1 - alpha) / (1 - now)) * data + each(alpha.sqrt() * (1 - before) / (1 - now)) * x
    return mean, small(before, now)


@needs("images", "labels", model=NOISE_TO_IMAGES)
def noise_prediction(model: nn.Module, batch: Any) -> PerExample:
    """Squared error of the noise (Eq. 14), a mean over pixels, at a step drawn evenly from 1 to 1000 for each image."""
    return _at_random_steps(model, batch)[0]


@needs("images", "labels", model=NOISE_TO_IMAGES)
def bound(model: nn.Module, batch: Any) -> PerExample:
    """The same error with the weight that the bound on the likelihood gives its step (Eq. 12), where the chain back has
    the variance of the chain forth; weights are over their mean, so that the rate may stay."""
    errors, step = _at_random_steps(model, batch)
    abar = signal()
    alpha = abar[1:] / abar[:-1]
    weight = (1 - alpha) / (2 * alpha * (1 - abar[1:]))
    return errors * (weight / weight.mean()).to(errors)[step - 1]


def _at_random_steps(model: nn.Module, batch: Any) -> tuple[PerExample, Tensor]:
    images = batch.images
    step = torch.randint(1, STEPS + 1, (len(images),), device=images.device)
    noise = torch.randn_like(images)
    x = noised(images, noise, signal().to(images)[step])
    return (model(x, step / STEPS, batch.labels) - noise).square().mean((1, 2, 3)), step


def small(before: PerExample, now: PerExample) -> PerExample:
    """The posterior's variance of x_{t-1} given x_t and the data (Eq. 7)."""
    return (1 - before) / (1 - now) * large(before, now)


def large(before: PerExample, now: PerExample) -> PerExample:
    """The variance of the step forth, beta_t = 1 - alpha_t."""
    return 1 - now / before


@torch.no_grad()
def sample(
    noise_of: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    largest: float = math.inf,
    variance: Callable[[PerExample, PerExample], PerExample] = small,
) -> Tensor:
    """Images from noise x (B, ...) by all steps of the chain back (Algorithm 2), with the `variance` of each step.

    noise_of(x, times) is a network's, times (B,) in [0, 1]. Its estimate of the data is clipped to [-largest, largest].
    """
    if not largest > 0:
        raise UserError(
            f"estimates of the data are clipped to at least some range, not to {largest}; set largest to 1.0"
        )
    abar = signal().to(x)
    for t in range(STEPS, 0, -1):
        now, before = abar[t].expand(len(x)), abar[t - 1].expand(len(x))
        noise = noise_of(x, torch.full((len(x),), t / STEPS, device=x.device))
        data = ((x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt()).clamp(-largest, largest)
        x, _ = posterior(data, x, before, now)
        if t > 1:
            x = x + variance(before, now)[0].sqrt() * torch.randn_like(x)
    return x


@paper(year=2020, arxiv="2006.11239")
def ddpm(*, dim: int = 192, depth: int = 3) -> Part:
    body = part(Pixels, depth=depth, block=part(PixelBlock, norm=LayerNorm), norm=LayerNorm)
    return part(
        Run,
        model=part(Denoiser, dim=dim, body=body),
        task=DigitDrawings,
        objective=noise_prediction,
        batches=from_task,
        optimizer=part(adamw, lr=2e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=128, steps=1200),
    )
