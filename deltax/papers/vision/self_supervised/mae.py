"""Masked Autoencoders Are Scalable Vision Learners. He, Chen, Xie, Li, Dollar, Girshick, 2021. arXiv:2111.06377

A ViT that predicts masked patches as BERT predicts words, but three quarters are masked and never encoded.

The encoder is given the visible patches only; a small decoder gets the mask tokens. Images are redundant: with few
patches masked, interpolation solves the task; with most masked, the encoder has to recognise objects. Without mask
tokens in the encoder, a step costs about a quarter, and there is no gap between pre-training and use. The target is
each masked patch, normalised by its own mean and variance. The paper's decoder for ViT-L has 8 blocks of width 512;
only the encoder is kept. Positions are fixed sinusoids in both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_MASKED_PATCHES, needs
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.backbones.vit import vit
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import Glorot
from deltax.parts.model.patches import Grid, GridSinusoids, pair, patchify, unpatchify
from deltax.parts.model.stack import Stack
from deltax.parts.training.roles import tag
from deltax.shapes import Images, OtherStream, PerExample, Stream
from deltax.tasks.images.pictures import Drawings

Pixels = Float[Tensor, "B T F"]


class Filled(NamedTuple):
    """The predicted pixels of every patch, and the indices of the visible patches."""

    pixels: Pixels
    kept: Int[Tensor, "B N"]

    @property
    def masked(self) -> Tensor:
        """(B, T) boolean."""
        everything = torch.ones(self.pixels.shape[:2], dtype=torch.bool, device=self.kept.device)
        return everything.scatter(1, self.kept, False)


@paper(on=vit, year=2021, arxiv="2111.06377")
def mae(recipe: Part, *, ratio: float = 0.75, dim: int = 32, depth: int = 1, heads: int = 4) -> Part:
    trunk = recipe["model.trunk"].fill("position", GridSinusoids)
    decoder = part(
        PixelDecoder,
        dim=dim,
        stack=part(Stack, depth=depth, block=trunk["stack.block"]).set(Attention, heads=heads),
        norm=trunk["norm"],
    )
    model = part(MaskedAutoencoder, ratio=ratio, trunk=trunk, pixel_decoder=decoder)
    return recipe.put("model", model).fill("task", Drawings).put("objective", part(fill_in))


class PixelDecoder(nn.Module):
    """Mask tokens for the masked patches, positions, a stack, a linear map to pixels (section 3, "MAE decoder").

    Latent (B, .prefix + N, W) and kept (B, N) -> pixels (B, T, F) of every patch of the trunk's grid.
    """

    def __init__(
        self, trunk: nn.Module, pixels: int, *, dim: int, position: Part = part(GridSinusoids), stack: Part, norm: Part
    ):
        super().__init__()
        self.prefix, self.count = trunk.prefix, math.prod(trunk.grid)
        self.enter = Glorot(trunk.width, dim)
        self.mask_token = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.position = position(dim, trunk.grid)
        self.stack = stack(dim)
        self.norm = norm(self.stack.width)
        self.predict = Glorot(self.stack.width, pixels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: OtherStream, kept: Int[Tensor, "B N"]) -> Pixels:
        # class token and visible patches
        first, seen = self.enter(latent).tensor_split([self.prefix], 1)
        if seen.shape[1] != kept.shape[1]:
            raise UserError(
                "this trunk pools patches across mask units: add hiera, as in vit+mae+q-pooled-attention+hiera"
            )
        where = kept[..., None].expand(-1, -1, seen.shape[-1])
        # (B, T, D): mask tokens everywhere, visible tokens scattered to their places
        patches = self.mask_token.expand(len(seen), self.count, -1).scatter(1, where, seen.to(self.mask_token.dtype))
        x = torch.cat([first, self.position(patches, Context())], 1)
        return self.predict(self.norm(self.stack(x, Context())))[:, self.prefix :]  # predictions of the patches only


@needs(outside=("Windows", "SpaceTimeBlock"))
class MaskedAutoencoder(nn.Module):
    """Images (B, C, Y, X) -> `Filled`. The task gives channels and size.

    The trunk has `.tokens(images)` (B, T, ...), `.read` for any subset of them, `.grid` and `.prefix`.
    """

    interface = IMAGES_TO_MASKED_PATCHES

    def __init__(self, channels: int, size: int | Grid, *, ratio: float = 0.75, trunk: Part, pixel_decoder: Part):
        super().__init__()
        if not 0 <= ratio < 1:
            raise UserError(f"ratio is the share of patches to mask, from 0 up to but not including 1, not {ratio}")
        self.ratio = ratio
        self.trunk = trunk(channels, size)
        self.patch = pair(size)[0] // self.trunk.grid[0]
        self.pixel_decoder = pixel_decoder(self.trunk, channels * self.patch**2)

    def encode(self, images: Images, kept: Int[Tensor, "B N"]) -> Stream:
        """The encoder's output for the visible patches, (B, .prefix + N, W)."""
        patches = patchify(images, self.patch)
        # masked pixels are zeroed first, since a trunk's overlapping convolutions would read them
        hidden = torch.ones_like(patches[..., 0], dtype=torch.bool).scatter(1, kept, False)
        shown = unpatchify(patches.masked_fill(hidden[..., None], 0), self.patch, self.trunk.grid)
        # (B, N, D): no mask token enters the encoder
        return self.trunk.read(take(self.trunk.tokens(shown), kept))

    def forward(self, images: Images, noise: Float[Tensor, "B T"] | None = None) -> Filled:
        if noise is None:
            noise = torch.rand(len(images), math.prod(self.trunk.grid), device=images.device)
        kept = keep(noise, self.ratio)
        return Filled(self.pixel_decoder(self.encode(images, kept), kept), kept)


def standardised(patches: Pixels) -> Pixels:
    """Each patch minus its mean, divided by its standard deviation: the best target (Table 1d)."""
    # the unbiased variance, as in the released code; one pixel has none
    spread = patches.var(-1, keepdim=True) if patches.shape[-1] > 1 else torch.ones_like(patches)
    return (patches - patches.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()


@needs("images", model=IMAGES_TO_MASKED_PATCHES)
def fill_in(model: nn.Module, batch: Any, *, target: Callable[[Pixels], Pixels] = part(standardised)) -> PerExample:
    """`masked_error` of the model's prediction, with `target` of each image's patches."""
    return masked_error(model(batch.images), target(patchify(batch.images, model.patch)))


def filled_in(model: MaskedAutoencoder, images: Images, noise: Float[Tensor, "B T"]) -> dict[str, Images]:
    """Images as visible (NaN where masked), as predicted, and as they are.

    Predicted patches get the true mean and standard deviation, which the normalised target lacks.
    """
    said, truth = model(images, noise), patchify(images, model.patch)
    masked = said.masked[..., None]
    # undoes `standardised`
    filled = said.pixels * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    rows = {"seen": truth.masked_fill(masked, float("nan")), "filled in": torch.where(masked, filled, truth)}
    return {word: unpatchify(row, model.patch, model.trunk.grid) for word, row in {**rows, "true": truth}.items()}


def keep(noise: Float[Tensor, "B T"], ratio: float) -> Int[Tensor, "B N"]:
    """Indices of the visible patches: those with the least noise, a fraction of 1 - ratio, at least one."""
    # shuffling by random noise, as in the released code
    return noise.argsort(1)[:, : max(1, int(noise.shape[1] * (1 - ratio)))]


def take(x: Tensor, kept: Int[Tensor, "B N"]) -> Tensor:
    """The elements of x (B, T, ...) at `kept` -> (B, N, ...)."""
    return x.gather(1, kept.view(*kept.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def masked_error(said: Filled, target: Pixels) -> PerExample:
    """Squared error of the pixels, averaged over each image's masked patches only."""
    each = (said.pixels - target).square().mean(-1)
    # ratio 0 masks nothing: the loss is 0
    return (each * said.masked).sum(1) / said.masked.sum(1).clamp(min=1)
