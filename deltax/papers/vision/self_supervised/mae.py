"""Masked Autoencoders Are Scalable Vision Learners. He, Chen, Xie, Li, Dollar, Girshick, 2021. arXiv:2111.06377

A ViT that fills in masked patches as BERT fills in words, but three in four are masked, the encoder sees only the
others, and a small decoder gets the mask tokens.

A picture is so redundant that hiding a little asks for nothing but a little smoothing; hide most of it and the encoder
must know what it looks at. Because no mask token ever enters the encoder, a step costs about a quarter, and what it
learns is about images without holes. The target is each hidden patch, standardised by itself. The paper's decoder for
ViT-L has 8 blocks of width 512; the encoder alone is kept. Positions are fixed sinusoids in both.
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
from deltax.parts.model.linear import XavierLinear
from deltax.parts.model.patches import Grid, GridSinusoids, pair, patchify, unpatchify
from deltax.parts.model.stack import Stack
from deltax.parts.training.roles import tag
from deltax.shapes import Images, OtherStream, PerExample, Stream
from deltax.tasks.images.pictures import Drawings

Pixels = Float[Tensor, "B T F"]


class Filled(NamedTuple):
    """What a masked autoencoder says the pixels of every patch are, and which patches it saw."""

    pixels: Pixels
    kept: Int[Tensor, "B N"]

    @property
    def masked(self) -> Tensor:
        """(B, T) boolean."""
        everything = torch.ones(self.pixels.shape[:2], dtype=torch.bool, device=self.kept.device)
        return everything.scatter(1, self.kept, False)


def random_masking(noise: Float[Tensor, "B T"], ratio: float) -> Int[Tensor, "B N"]:
    """The patches of least noise, a share of 1 - ratio, rounded down but at least one, in the order of their noise."""
    return noise.argsort(1)[:, : max(1, int(noise.shape[1] * (1 - ratio)))]


def gather(x: Tensor, kept: Int[Tensor, "B N"]) -> Tensor:
    """Those elements of x (B, T, ...) -> (B, N, ...)."""
    return x.gather(1, kept.view(*kept.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


class PixelDecoder(nn.Module):
    """Mask tokens where nothing was seen, positions, a stack, a linear map to pixels (section 3, MAE decoder).

    Latent (B, .prefix + N, W) and kept (B, N) -> pixels (B, T, F) of every patch of the trunk's grid.
    """

    def __init__(
        self, trunk: nn.Module, pixels: int, *, dim: int, position: Part = part(GridSinusoids), stack: Part, norm: Part
    ):
        super().__init__()
        self.prefix, self.count = trunk.prefix, math.prod(trunk.grid)
        self.enter = XavierLinear(trunk.width, dim)
        self.mask_token = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.position = position(dim, trunk.grid)
        self.stack = stack(dim)
        self.norm = norm(self.stack.width)
        self.predict = XavierLinear(self.stack.width, pixels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: OtherStream, kept: Int[Tensor, "B N"]) -> Pixels:
        first, seen = self.enter(latent).tensor_split([self.prefix], 1)
        if seen.shape[1] != kept.shape[1]:
            raise UserError("a trunk that pools its patches has to keep mask units whole: add hiera, as in ...+hiera")
        where = kept[..., None].expand(-1, -1, seen.shape[-1])
        patches = self.mask_token.expand(len(seen), self.count, -1).scatter(1, where, seen.to(self.mask_token.dtype))
        x = torch.cat([first, self.position(patches, Context())], 1)
        return self.predict(self.norm(self.stack(x, Context())))[:, self.prefix :]


@needs(outside=("Windows", "SpaceTimeBlock"))
class MaskedAutoencoder(nn.Module):
    """Images (B, C, Y, X) -> `Filled`. channels and size are the task's.

    The trunk gives `.tokens(images)` (B, T, ...), reads any of them with `.read`, and has a `.grid` and a `.prefix`.
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
        """What the encoder makes of these patches, (B, .prefix + N, W); of the others it is shown zeros at most."""
        patches = patchify(images, self.patch)
        hidden = torch.ones_like(patches[..., 0], dtype=torch.bool).scatter(1, kept, False)
        shown = unpatchify(patches.masked_fill(hidden[..., None], 0), self.patch, self.trunk.grid)
        return self.trunk.read(gather(self.trunk.tokens(shown), kept))

    def forward(self, images: Images, noise: Float[Tensor, "B T"] | None = None) -> Filled:
        if noise is None:
            noise = torch.rand(len(images), math.prod(self.trunk.grid), device=images.device)
        kept = random_masking(noise, self.ratio)
        return Filled(self.pixel_decoder(self.encode(images, kept), kept), kept)


def standardised(patches: Pixels) -> Pixels:
    """Each patch less its mean, over its deviation: the target that learns most (Table 1d)."""
    spread = patches.var(-1, keepdim=True) if patches.shape[-1] > 1 else torch.ones_like(patches)
    return (patches - patches.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()


def masked_error(said: Filled, target: Pixels) -> PerExample:
    """Squared error of the pixels, a mean over the masked patches alone, of each image."""
    each = (said.pixels - target).square().mean(-1)
    return (each * said.masked).sum(1) / said.masked.sum(1).clamp(min=1)


@needs("images", model=IMAGES_TO_MASKED_PATCHES)
def reconstruct(model: nn.Module, batch: Any, *, target: Callable[[Pixels], Pixels] = part(standardised)) -> PerExample:
    """`masked_error` of a model against the target that is made of each image's patches."""
    return masked_error(model(batch.images), target(patchify(batch.images, model.patch)))


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
    return recipe.put("model", model).fill("task", Drawings).put("objective", part(reconstruct))


def filled_in(model: MaskedAutoencoder, images: Images, noise: Float[Tensor, "B T"]) -> dict[str, Images]:
    """Images as they are seen, NaN where a patch is hidden; as they are filled in; and as they are.

    Filled patches have the mean and deviation of the true ones, which the target leaves out.
    """
    said, truth = model(images, noise), patchify(images, model.patch)
    masked = said.masked[..., None]
    filled = said.pixels * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    rows = {"seen": truth.masked_fill(masked, float("nan")), "filled in": torch.where(masked, filled, truth)}
    return {word: unpatchify(row, model.patch, model.trunk.grid) for word, row in {**rows, "true": truth}.items()}
