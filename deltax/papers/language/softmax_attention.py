"""Attention Is All You Need, section 3.2.
Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, 2017. arXiv:1706.03762

A weighted mean of values, but the weights are a softmax of what each query says to each key, in several heads at once.

Every position asks, every position answers, and nobody waits for a recurrence. Heads split the width, so each may look
elsewhere. Divided by sqrt(K), the products start with variance one and the softmax does not start saturated.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.parts.context import Context, placed
from deltax.parts.linear import Linear, Out
from deltax.parts.nothing import Nothing
from deltax.parts.scores import Rules, among, causal, everywhere, unchanged
from deltax.shapes import Heads, Keys, Memory, OtherStream, Queries, Stream, Values


def attend(q: Queries, k: Keys, v: Values, rules: Rules | None = None) -> Heads:
    """softmax(rules(q k' / sqrt(K))) v for each head (Eq. 1); the reference for every attention kernel.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K).
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = (rules or Rules())(scores)
    blind = scores.isneginf().all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("bhts,bshk->bthk", weights, v)


class Projections(nn.Module):
    """Stream to heads and back. Stream (B, T, D) -> q, k, v (B, T, H, K), and (B, T, H, K) -> (B, T, D)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        query: Part = part(Linear),
        key: Part = part(Linear),
        value: Part = part(Linear),
        out: Part = part(Out),
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = query(dim, dim), key(dim, dim), value(dim, dim)
        self.out = out(dim, dim)

    def split(
        self, x: Stream, memory: Memory | None = None, values: Memory | None = None
    ) -> tuple[Queries, Keys, Values]:
        """Queries of x, keys of the memory, which is x by default, and values of `values`, the memory by default."""
        memory = x if memory is None else memory
        values = memory if values is None else values
        heads = lambda y: y.unflatten(-1, (self.heads, -1))
        return heads(self.query(x)), heads(self.key(memory)), heads(self.value(values))

    def join(self, heads: Heads) -> Stream:
        return self.out(heads.flatten(-2))


class Attention(nn.Module):
    """project -> qk_norm -> qk_position -> kernel(score, mask) -> project back. Stream (B, T, D) -> (B, T, D).

    Under a decoding state it keeps the keys and values it has seen.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        project: Part = part(Projections),
        qk_norm: Part = part(Nothing),
        qk_position: Part = part(Nothing),
        score: Part = part(unchanged),
        mask: Part = part(everywhere),
        kernel: Part = part(attend),
    ):
        super().__init__()
        self.project = project(dim, heads)
        self.query_norm, self.key_norm = qk_norm(dim // heads), qk_norm(dim // heads)
        self.position = qk_position(dim // heads)
        self.score = score(heads) if isinstance(score.make, type) else score
        self.mask = mask
        self.kernel = kernel

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        q, k, v = self.heads(x, ctx)
        rules = self.rules(ctx)
        if ctx.state is not None:
            here = ctx.where(x)
            k, v, seen = ctx.state.append(self, (k, v, here), axes=(1, 1, -1))
            rules = Rules(self.score, self.mask, here, seen)
        return self.project.join(self.kernel(q, k, v, rules))

    def heads(self, x: Stream, ctx: Context) -> tuple[Float[Tensor, "B _ H K"], Keys, Values]:
        """What the stream asks and says, normalised and placed. A projection may ask less often than at every T."""
        standing = placed(x, ctx.place)
        q, k, v = self.project.split(standing, standing, x)
        here = ctx.where(x)
        return self.position(self.query_norm(q), here), self.position(self.key_norm(k), here), v

    def rules(self, ctx: Context) -> Rules:
        """Who sees whom, outside decoding."""
        return Rules(self.score, self.mask, ctx.positions, ctx.positions, ctx.segments, ctx.segments)


class CrossAttention(nn.Module):
    """Attention whose keys and values are the memory's. Stream (B, T, D), memory (B, S, D) in ctx -> (B, T, D)."""

    def __init__(self, dim: int, *, heads: int = 4, project: Part = part(Projections), kernel: Part = part(attend)):
        super().__init__()
        self.project = project(dim, heads)
        self.kernel = kernel

    def forward(self, x: Stream, ctx: Context) -> Stream:
        keys = placed(ctx.memory, ctx.memory_place)
        q, k, v = self.project.split(placed(x, ctx.place), keys, ctx.memory)
        seen = part(everywhere) if ctx.memory_seen is None else among(ctx.memory_seen)
        rules = Rules(mask=seen, q_segments=ctx.segments, k_segments=ctx.memory_segments)
        return self.project.join(self.kernel(q, k, v, rules))


@paper(year=2017, arxiv="1706.03762")
def softmax_attention(recipe: Part, *, heads: int = 4) -> Part:
    return recipe.fill("mixer", Attention, heads=heads, mask=causal)


@claim
def without_positions_order_is_not_seen():
    """Permuting the elements permutes the output, and does nothing else: f(Px) = P f(x)."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(attention(x[:, order], Context()), attention(x, Context())[:, order])


@claim
def the_future_is_not_seen():
    """Under the causal mask, changing later elements changes no earlier output."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3, mask=part(causal)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    later = torch.cat([x[:, :4], torch.randn(2, 3, 12, dtype=torch.float64)], 1)
    torch.testing.assert_close(attention(x, Context())[:, :4], attention(later, Context())[:, :4])
    assert not torch.allclose(attention(x, Context())[:, 4:], attention(later, Context())[:, 4:])


@claim
def a_query_that_sees_nothing_gets_nothing():
    """A query whose keys are all masked gives zeros, and no NaN in any gradient."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    segments = torch.tensor([[0, 0, 1]])
    out = attend(q, k, v, Rules(q_segments=segments, k_segments=torch.zeros_like(segments)))
    out.sum().backward()
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@claim.parity(peer="torch.nn.functional.scaled_dot_product_attention")
def equals_torch():
    """Output and gradients equal torch's, causal and not, with fewer key heads than query heads, at odd lengths."""
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
