"""RoFormer: Enhanced Transformer with Rotary Position Embedding.
Su, Lu, Pan, Murtadha, Wen, Liu, 2021. arXiv:2104.09864

Attention, but queries and keys are turned by their position instead of being given a position vector.

Take the features two by two as complex numbers and turn the i-th by an angle of position times theta_i, where the
theta_i fall geometrically. A product of two turned numbers knows only the difference of their angles, so a score knows
only distance. Values are not turned.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper
from deltax.papers.language.gpt import gpt
from deltax.papers.language.softmax_attention import Attention
from deltax.parts.context import Context
from deltax.parts.nothing import Nothing
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


@claim
def only_distance_matters():
    """Moving query and key together leaves their product as it was."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turn = lambda x, at: rotate(
        x, torch.tensor([float(at)], dtype=torch.float64)[:, None] * torch.logspace(0, -3, 4, dtype=torch.float64)
    )
    product = lambda m, n: (turn(q, m) * turn(k, n)).sum()
    torch.testing.assert_close(product(3, 1), product(103, 101))
    assert not torch.isclose(product(3, 1), product(3, 2))


@claim
def lengths_are_kept():
    """Turning changes no norm, and at position zero it changes nothing at all, to the bit."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8)
    turned = Rotary(8)(x, torch.arange(5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


@claim
def both_pairings_agree():
    """Pairing halves here is pairing neighbours in the paper, after one permutation of the features."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    numbers = torch.view_as_complex(interleave(x).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)[:, None, :]).flatten(-2)
    torch.testing.assert_close(interleave(rotate(x, angle)), turned)


@claim
def a_shifted_text_is_the_same_text():
    """Attention with RoPE and no other positions gives the same output wherever the text begins."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3, qk_position=Part(Rotary)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    moved = attention(x, Context(positions=torch.arange(7) + 1000))
    torch.testing.assert_close(moved, attention(x, Context()), rtol=1e-4, atol=1e-5)


@claim.parity(peer="transformers LlamaRotaryEmbedding and apply_rotary_pos_emb")
def equals_transformers():
    """Queries and keys come out as Llama's do in transformers."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 9, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 9, 2, 11, 700, 1, 0, 3, 4]])
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, peer in zip((q, k), theirs):
        torch.testing.assert_close(Rotary(8)(x, positions), peer.transpose(1, 2), rtol=1e-5, atol=1e-5)


@claim.measured(
    paper="compute-equivalent gain over learned positions 1.26 at 3.6M parameters (MIT FutureTech ablation)"
)
def saves_compute(lab):
    """Tuned alike, gpt + rope reaches gpt's loss with less compute."""
    return lab.compare("gpt", "gpt+rope").better
