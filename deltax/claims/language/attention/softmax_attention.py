"""Claims of softmax-attention: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.papers.language.attention.softmax_attention import Attention, attend
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import Rules, causal, everywhere


@claim
def without_positions_order_is_not_seen():
    """Attention without positions is permutation equivariant: f(P x) = P f(x) for a random permutation P."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(attention(x[:, order], Context()), attention(x, Context())[:, order])


@claim
def the_future_is_not_seen():
    """Under the causal mask, changing later positions leaves the outputs of earlier ones unchanged."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3, mask=part(causal)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    later = torch.cat([x[:, :4], torch.randn(2, 3, 12, dtype=torch.float64)], 1)
    torch.testing.assert_close(attention(x, Context())[:, :4], attention(later, Context())[:, :4])
    assert not torch.allclose(attention(x, Context())[:, 4:], attention(later, Context())[:, 4:])


@claim
def a_query_that_sees_nothing_gets_nothing():
    """A query with every key masked gives zeros, and no gradient is NaN."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    segments = torch.tensor([[0, 0, 1]])
    out = attend(q, k, v, Rules(q_segments=segments, k_segments=torch.zeros_like(segments)))
    out.sum().backward()
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@claim.parity(peer="torch.nn.functional.scaled_dot_product_attention")
def equals_torch():
    """Output and gradients equal those of torch's scaled_dot_product_attention: causal or not, grouped keys, odd
    lengths.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    for mask in (causal, everywhere):
        ours, theirs = (
            [t.requires_grad_() for t in tensors]
            for tensors in zip(*((t, t.clone()) for t in _random_heads(time=13, heads=6, groups=2)))
        )
        out = attend(*ours, Rules(mask=part(mask)))
        with sdpa_kernel(SDPBackend.MATH):
            peer = nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in theirs), is_causal=mask is causal, enable_gqa=True
            ).transpose(1, 2)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (peer * weight).sum().backward()
        torch.testing.assert_close(out, peer, rtol=1e-12, atol=1e-12)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def _random_heads(time: int, heads: int, groups: int) -> list[Tensor]:
    return [torch.randn(2, time, n, 5, dtype=torch.float64) for n in (heads, groups, groups)]
