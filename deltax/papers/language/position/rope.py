"""RoFormer: Enhanced Transformer with Rotary Position Embedding.
Su, Lu, Pan, Murtadha, Wen, Liu, 2021. arXiv:2104.09864

Attention, but queries and keys are rotated by their position instead of being given a position vector.

Features are paired as complex numbers, and pair i is rotated by the angle position * theta_i, where theta_i falls
geometrically. The product of two rotated numbers depends on the difference of their angles alone, so the logit
depends on content and relative distance. Values are not rotated.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.language.attention.softmax_attention import softmax_attention
from deltax.papers.language.models.transformer import transformer
from deltax.parts.model.nothing import Nothing
from deltax.shapes import Heads, Positions


def angles(positions: Positions, width: int, base: float) -> Tensor:
    """position * theta_i with theta_i = base^(-2 i / width), in float32 (Eq. 15). (*B, T) -> (*B, T, width / 2)."""
    # theta_i = base^(-2 i / width); in float32 the error of the angle would grow with the position
    theta = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    return (positions[..., None] * theta).float()


def rotate(x: Heads, angle: Tensor) -> Heads:
    """Turn feature pairs (i, i + K/2) by angle (*B, T, K/2); time-major heads (B, T, H, K) -> (B, T, H, K).

    The paper pairs neighbours (2i, 2i + 1); released weights since GPT-NeoX pair halves, as here. The two differ by a
    permutation of the features, `interleave`.
    """
    # (*B, T, K/2) -> (*B, T, 1, K/2), the same for all heads
    cos, sin = (f(angle).to(x.dtype)[..., None, :] for f in (torch.cos, torch.sin))
    real, imaginary = x.chunk(2, -1)
    # (real + i imaginary) e^(i angle)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def interleave(x: Tensor) -> Tensor:
    """Reorder features (.., K) from pairs of halves (i, i + K/2) to pairs of neighbours (2i, 2i + 1)."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


class Rotary(nn.Module):
    """Rotates each head by its position. Heads (B, T, H, K), K even, and positions (*B, T) -> (B, T, H, K)."""

    def __init__(self, width: int, *, base: float = 10_000.0):
        super().__init__()
        if width % 2:
            raise UserError(
                f"rope rotates pairs of features, and a head width of {width} is odd: choose other dim or heads"
            )
        self.base = base

    def forward(self, x: Heads, positions: Positions) -> Heads:
        return rotate(x, angles(positions, x.shape[-1], self.base))


@paper(on=(softmax_attention, transformer), arxiv="2104.09864", year=2021, whole="gpt")
def rope(recipe: Part, *, base: float = 10_000.0) -> Part:
    # nothing is added to the embeddings
    return recipe.fill("position", Nothing).fill("qk_position", Rotary, base=base)
