"""Claims of rope: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import Part, claim
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.language.position.rope import Rotary, interleave, rotate
from deltax.parts.attention.context import Context


@claim
def only_distance_matters():
    """Adding the same offset to the positions of query and key leaves their dot product unchanged."""
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
    """Rotation preserves the norm, and at position zero the output equals the input bit for bit."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8)
    turned = Rotary(8)(x, torch.arange(5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


@claim
def both_pairings_agree():
    """Pairing halves (here) equals pairing neighbours (the paper) after one permutation of the features."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    numbers = torch.view_as_complex(interleave(x).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)[:, None, :]).flatten(-2)
    torch.testing.assert_close(interleave(rotate(x, angle)), turned)


@claim
def a_shifted_text_is_the_same_text():
    """Attention with RoPE and no other positions gives the same output for any starting position."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3, qk_position=Part(Rotary)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    moved = attention(x, Context(positions=torch.arange(7) + 1000))
    torch.testing.assert_close(moved, attention(x, Context()), rtol=1e-4, atol=1e-5)


@claim.parity(peer="transformers LlamaRotaryEmbedding and apply_rotary_pos_emb")
def equals_transformers():
    """Rotated queries and keys equal those of transformers' Llama."""
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
    """Both with tuned learning rates, gpt + rope reaches gpt's loss with less compute."""
    return lab.compare("gpt", "gpt+rope").better
