"""Autoencoders: an encoder, a bottleneck, a decoder; the frame that the tokenizers of images and videos share.

Pixels are images (B, C, Y, X) or videos (B, C, T, Y, X) in [-1, 1]; a latent has the same axes, smaller.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.contract import PIXELS_TO_PIXELS, needs
from deltax.parts.numerics.precision import in_float32
from deltax.recipe import Part, part
from deltax.shapes import PerExample

Pixels = Float[Tensor, "B _ ..."]
Latent = Float[Tensor, "B _ ..."]


class Passed(NamedTuple):
    """What a bottleneck lets through, what it charges for each example, and which codes these are where it has any."""

    latent: Latent
    cost: PerExample
    codes: Int64[Tensor, "B ..."] | None = None


class Rebuilt(NamedTuple):
    """What an autoencoder makes of pixels, and what its bottleneck let through."""

    pixels: Pixels
    passed: Passed


class NoBottleneck(nn.Module):
    """A bottleneck of `width` channels and nothing else: a plain autoencoder."""

    def __init__(self, *, width: int = 16):
        super().__init__()
        self.enters = self.leaves = width

    def forward(self, latent: Latent) -> Passed:
        return Passed(latent, latent.new_zeros(len(latent)))


class Gaussian(nn.Module):
    """The bottleneck of a VAE (arXiv:1312.6114): (B, 2 width, ...) is mean and log variance, (B, width, ...) drawn.

    It charges `weight` times the KL divergence from the standard normal in nats, a mean over the latent's floats. In
    evaluation the mean is let through.
    """

    def __init__(self, *, width: int = 16, weight: float = 1e-3):
        super().__init__()
        self.enters, self.leaves, self.weight = 2 * width, width, weight

    def forward(self, latent: Latent) -> Passed:
        mean, log_variance = latent.chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return Passed(drawn, self.weight * divergence(mean, log_variance).flatten(1).mean(1))


@in_float32
def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, elementwise."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


class Autoencoder(nn.Module):
    """encoder -> bottleneck -> decoder. Pixels -> `Rebuilt`. channels is the task's.

    The bottleneck says how many channels enter it and how many leave it.
    """

    interface = PIXELS_TO_PIXELS

    def __init__(self, channels: int, *, encoder: Part, bottleneck: Part = part(NoBottleneck), decoder: Part):
        super().__init__()
        self.bottleneck = bottleneck()
        self.encoder = encoder(channels, self.bottleneck.enters)
        self.decoder = decoder(self.bottleneck.leaves, channels)

    def encode(self, pixels: Pixels) -> Passed:
        return self.bottleneck(self.encoder(pixels))

    def decode(self, latent: Latent) -> Pixels:
        return self.decoder(latent)

    def forward(self, pixels: Pixels) -> Rebuilt:
        passed = self.encode(pixels)
        return Rebuilt(self.decode(passed.latent), passed)


def squared(said: Pixels, true: Pixels) -> PerExample:
    """The squared error of each example, a mean over its pixels."""
    return (said - true).square().flatten(1).mean(1)


def absolute(said: Pixels, true: Pixels) -> PerExample:
    """The absolute error of each example, a mean over its pixels."""
    return (said - true).abs().flatten(1).mean(1)


@needs("{of}", model=PIXELS_TO_PIXELS)
def rebuild(
    model: nn.Module, batch: Any, *, error: Callable[[Pixels, Pixels], PerExample] = part(squared), of: str = "images"
) -> PerExample:
    """The error of what an `Autoencoder` makes of the batch's images or videos, and what its bottleneck charges."""
    pixels = getattr(batch, of)
    made = model(pixels)
    return error(made.pixels, pixels) + made.passed.cost


def decibels(error: float) -> float:
    """The peak signal-to-noise ratio of pixels in [-1, 1] at this mean squared error; infinite without one."""
    return 10 * math.log10(4 / error) if error > 0 else math.inf
