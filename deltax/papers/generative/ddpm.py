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

from deltax import Part, UserError, claim, paper, part
from deltax.contract import NOISE_TO_IMAGES, needs
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.parts.denoiser import Denoiser, PixelBlock, Pixels
from deltax.parts.optimizers import adamw
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.shapes import PerExample
from deltax.tasks.digits import DigitDrawings
from deltax.tasks.evaluation import energy_distance

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
        optimizer=part(adamw, rate=2e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=128, steps=1200),
    )


@claim
def the_posterior_is_a_product_of_gaussians():
    """At every step the closed form of q(x_{t-1} | x_t, x_0) is the product of the chain's step and the noised data."""
    torch.manual_seed(0)
    abar = signal()[1:]
    before, now = abar[:-1], abar[1:]
    data, x = torch.randn(2, len(now), 1, dtype=torch.float64)
    alpha = now / before
    step, chain = alpha / (1 - alpha), 1 / (1 - before)  # what each factor adds to the precision
    mean = ((step / alpha.sqrt())[:, None] * x + (chain * before.sqrt())[:, None] * data) / (step + chain)[:, None]
    ours, variance = posterior(data, x, before, now)
    torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, 1 / (step + chain), rtol=1e-10, atol=1e-12)


@claim
def a_thousand_steps_are_one():
    """Noising step by step gives the mean and the variance that noising at once gives."""
    abar = signal()
    mean, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        alpha = abar[t] / abar[t - 1]
        mean, variance = alpha.sqrt() * mean, alpha * variance + (1 - alpha)
        torch.testing.assert_close(torch.stack([mean, variance]), torch.stack([abar[t].sqrt(), 1 - abar[t]]))


@claim.parity(peer="diffusers DDPMScheduler")
def equals_diffusers():
    """Noised images, their gradients, and mean and variance of steps back equal diffusers' all along the chain."""
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    settings = {"beta_schedule": "linear", "clip_sample": False, "variance_type": "fixed_small"}
    peer = DDPMScheduler(num_train_timesteps=STEPS, **settings)
    abar = signal().float()
    for t in (1, 2, 77, 500, 999, 1000):
        data, noise, weight = torch.randn(3, 2, 1, 5, 3)
        ours, theirs = data.clone().requires_grad_(), data.clone().requires_grad_()
        a = noised(ours, noise, abar[[t, t]])
        b = peer.add_noise(theirs, noise, torch.tensor([t - 1, t - 1]))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        gradients = (torch.autograd.grad((x * weight).sum(), y)[0] for x, y in ((a, ours), (b, theirs)))
        torch.testing.assert_close(*gradients)
        x = b.detach()
        guess = (x - (1 - abar[t]).sqrt() * weight) / abar[t].sqrt()
        mean, variance = posterior(guess, x, abar[[t - 1] * 2], abar[[t] * 2])
        torch.testing.assert_close(variance[0].clamp(min=1e-20), peer._get_variance(t - 1), rtol=2e-3, atol=1e-9)
        if t == 1:  # the last step adds no noise, so the peer's step is its mean
            torch.testing.assert_close(mean, peer.step(weight, 0, x).prev_sample, rtol=1e-4, atol=1e-4)
        else:
            torch.manual_seed(t)
            stepped = peer.step(weight, t - 1, x, generator=torch.Generator().manual_seed(t)).prev_sample
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            torch.testing.assert_close(mean + variance[0].sqrt() * drawn, stepped, rtol=1e-3, atol=1e-3)


@claim.parity(peer="diffusers DDPMScheduler, fixed_large and clip_sample")
def equals_diffusers_as_released():
    """With the data clipped to [-1, 1] and the variance of the step forth, all steps back from the same noise are
    diffusers' "fixed_large" steps."""
    from unittest.mock import patch

    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    peer = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="linear", variance_type="fixed_large")
    x, draws = torch.randn(2, 1, 5, 3), torch.randn(STEPS + 1, 2, 1, 5, 3)
    noise_of = lambda x, times: (3 * x + 5 * times.view(-1, 1, 1, 1)).sin() * 1.5
    theirs = x
    for t in range(STEPS, 0, -1):
        noise = noise_of(theirs, torch.full((2,), t / STEPS))
        mean = peer.step(noise, t - 1, theirs, generator=torch.Generator().manual_seed(t)).prev_sample
        draws[t] = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        theirs = mean
    order = iter(range(STEPS, 1, -1))
    with patch("torch.randn_like", lambda _: draws[next(order)]):
        ours = sample(noise_of, x, largest=1.0, variance=large)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@claim
def each_variance_is_right_for_its_data():
    """Of data N(0, 1) and their exact noise, a step back of the larger variance gives x_{t-1} a variance of one again,
    a step of the smaller one less; of a single point, the smaller one gives 1 - abar_{t-1} (section 3.2)."""
    abar = signal()
    before, now = abar[:-1], abar[1:]
    unit = torch.ones_like(now)[:, None]
    shrinks = posterior(now.sqrt()[:, None], unit, before, now)[0][:, 0]  # E[x_0 | x_t] = sqrt(abar) x_t
    torch.testing.assert_close(shrinks.square() + large(before, now), torch.ones_like(now), rtol=1e-10, atol=0)
    assert (shrinks.square() + small(before, now) < 1).all()
    along = posterior(torch.zeros_like(unit), unit, before, now)[0][:, 0]  # the point is 0
    torch.testing.assert_close(along.square() * (1 - now) + small(before, now), 1 - before, rtol=1e-10, atol=1e-15)


@claim
def the_whole_chain_finds_the_data():
    """With the exact noise of a data set of one image, the chain back from any noise ends on that image."""
    torch.manual_seed(0)
    abar = signal()
    image, x = torch.randn(1, 1, 3, 5, dtype=torch.float64), torch.randn(4, 1, 3, 5, dtype=torch.float64)
    level = lambda times: abar[(times * STEPS).round().long()].view(-1, 1, 1, 1)
    exact = lambda x, times: (x - level(times).sqrt() * image) / (1 - level(times)).sqrt()
    torch.testing.assert_close(sample(exact, x), image.expand_as(x), rtol=1e-9, atol=1e-9)


@claim.measured(paper="CIFAR-10: FID 3.17 without the weights of the bound, 13.51 with them (Table 2)")
def samples_are_better_without_the_weights(lab):
    """Trained without the weights of the bound, the network draws digits nearer to held-out ones, by the whole chain,
    than trained with them: their energy distance is less by at least a fifth."""
    held_out = lab.task("ddpm").all("validation").images
    labels = torch.arange(300) % 10
    plain = lab.recipe("ddpm")
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        distances = {}
        for name, recipe in (("without weights", plain), ("with weights", plain.fill("objective", bound))):
            model = lab.train(recipe, seed=seed).model
            torch.manual_seed(seed)
            images = sample(lambda x, times, model=model: model(x, times, labels), torch.randn(300, 1, 8, 8))
            distances[name] = energy_distance(images, held_out)
            numbers.setdefault(f"{name}: distance", []).append(distances[name])
        gains.append(1 - distances["without weights"] / distances["with weights"])
    return lab.at_least(gains, 0.2, unit="of the distance with weights", numbers=numbers)
