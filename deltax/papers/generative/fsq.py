"""Finite Scalar Quantization: VQ-VAE Made Simple. Mentzer, Minnen, Agustsson, Tschannen, 2023. arXiv:2309.15505

VQ-VAE, but with no codebook: each of a few numbers is squashed and rounded to one of its levels.

A learned codebook collapses, and is then kept alive by losses and tricks. A grid cannot collapse: its entries are all
combinations of levels, and whatever the encoder says lies next to one. The gradient goes straight through the rounding
and sees the tanh. With an even number of levels the grid has one more below zero than above. Shifted by atanh as here,
zero stays zero; the paper's listing shifts by tan, and so nearly.
"""

import math

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax import Part, paper
from deltax.errors import UserError
from deltax.papers.generative.vq_vae import straight_through, vq_vae
from deltax.parts.model.autoencoder import Latent, Passed

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
