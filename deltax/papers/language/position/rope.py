"""RoFormer: Enhanced Transformer with Rotary Position Embedding.
Su, Lu, Pan, Murtadha, Wen, Liu, 2021. arXiv:2104.09864

Attention, but queries and keys are turned by their position instead of being given a position vector.

Take the features two by two as complex numbers and turn the i-th by an angle of position times theta_i, where the
theta_i fall geometrically. A product of two turned numbers knows only the difference of their angles, so a score knows
only distance. Values are not turned.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.nothing import Nothing
from deltax.shapes import Heads, Positions


def angles(positions: Positions, width: int, base: float) -> Tensor:
    """position * theta_i with theta_i = base^(-2 i / width), in float32 (Eq. 15). (*B, T) -> (*B, T, width / 2)."""
    theta = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    return (positions[..., None] * theta).float()


def rotate(x: Heads, angle: Tensor) -> Heads:
    """Turn feature pairs (i, i + K/2) by angle (*B, T, K/2); time-major heads (B, T, H, K) -> (B, T, H, K).

    The paper pairs neighbours (2i, 2i + 1). Which features make a pair is a matter of naming, and released weights
    since GPT-NeoX pair halves, so halves it is; `interleave` converts.
    """
    cos, sin = (f(angle).to(x.dtype)[..., None, :] for f in (torch.cos, torch.sin))
    real, imaginary = x.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def interleave(x: Tensor) -> Tensor:
    """Features paired by halves, (.., K), as features paired by neighbours."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


class Rotary(nn.Module):
    """Turns each head by its position. Heads (B, T, H, K), K even, and positions (*B, T) -> (B, T, H, K)."""

    def __init__(self, width: int, *, base: float = 10_000.0):
        super().__init__()
        if width % 2:
            raise UserError(f"features are turned in pairs, and a head of {width} is odd: choose other dim or heads")
        self.base = base

    def forward(self, x: Heads, positions: Positions) -> Heads:
        return rotate(x, angles(positions, x.shape[-1], self.base))


@paper(on=gpt, arxiv="2104.09864", year=2021)
def rope(recipe: Part, *, base: float = 10_000.0) -> Part:
    return recipe.fill("position", Nothing).fill("qk_position", Rotary, base=base)
