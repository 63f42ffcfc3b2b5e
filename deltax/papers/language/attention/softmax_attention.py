"""Attention Is All You Need, section 3.2.
Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, 2017. arXiv:1706.03762

A weighted mean of values, but the weights are the softmax of query-key dot products, in several heads.

All positions are computed in parallel, without a recurrence. Each head works on its own slice of the width. The dot
products are divided by sqrt(K): with unit-variance queries and keys the logits have variance one, and the softmax does
not start saturated.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.parts.attention.context import Context, placed
from deltax.parts.attention.scores import Rules, among, causal, everywhere, unchanged
from deltax.parts.model.linear import Linear, Out
from deltax.parts.model.nothing import Nothing
from deltax.shapes import Heads, Keys, Memory, OtherStream, Queries, Stream, Values


def attend(q: Queries, k: Keys, v: Values, rules: Rules | None = None) -> Heads:
    """softmax(rules(q k' / sqrt(K))) v for each head (Eq. 1); every attention kernel is compared with it.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K).
    """
    groups = q.shape[2] // k.shape[2]
    # (B, S, G, K) -> (B, S, H, K)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    # (B, T, H, K), (B, S, H, K) -> (B, H, T, S); the scale is by the width of a head, not of the stream
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = (rules or Rules())(scores)
    # the softmax of a row of -inf is NaN: a query with every key masked gets zeros instead
    blind = scores.isneginf().all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("bhts,bshk->bthk", weights, v)


@paper(year=2017, arxiv="1706.03762")
def softmax_attention(recipe: Part, *, heads: int = 4) -> Part:
    return recipe.fill("mixer", Attention, heads=heads, mask=causal)


class Projections(nn.Module):
    """Linear maps W_Q, W_K, W_V and W_O. Stream (B, T, D) -> q, k, v (B, T, H, K), and (B, T, H, K) -> (B, T, D)."""

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
            raise ValueError(f"dim {dim} is not a multiple of {heads} heads: change dim or heads")
        self.heads = heads
        self.query, self.key, self.value = query(dim, dim), key(dim, dim), value(dim, dim)
        self.out = out(dim, dim)

    def split(
        self, x: Stream, memory: Memory | None = None, values: Memory | None = None
    ) -> tuple[Queries, Keys, Values]:
        """Queries from x, keys from `memory` (default x), values from `values` (default `memory`)."""
        memory = x if memory is None else memory
        values = memory if values is None else values
        heads = lambda y: y.unflatten(-1, (self.heads, -1))  # (B, T, D) -> (B, T, H, K)
        return heads(self.query(x)), heads(self.key(memory)), heads(self.value(values))

    def join(self, heads: Heads) -> Stream:
        return self.out(heads.flatten(-2))  # Concat(head_1, .., head_H) W^O


class Attention(nn.Module):
    """project -> qk_norm -> qk_position -> kernel(score, mask) -> project back. Stream (B, T, D) -> (B, T, D).

    With a decoding state, keys and values of earlier tokens are cached there, with their positions and segments.
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
            # the cache grows along T; queries are of the new tokens alone
            ctx.state.check(self, ctx)
            here, segments = ctx.where(x), () if ctx.segments is None else (ctx.segments,)
            new = (k, v, here, *segments)
            k, v, seen, *seen_segments = ctx.state.append(self, new, axes=(1, 1, -1, -1)[: len(new)])
            rules = Rules(self.score, self.mask, here, seen, *segments, *seen_segments)
        return self.project.join(self.kernel(q, k, v, rules))

    def heads(self, x: Stream, ctx: Context) -> tuple[Float[Tensor, "B _ H K"], Keys, Values]:
        """Queries, keys and values after qk_norm and qk_position. A projection may give fewer queries than T."""
        # position vectors are added for queries and keys, not for values
        standing = placed(x, ctx.place)
        q, k, v = self.project.split(standing, standing, x)
        here = ctx.where(x)
        return self.position(self.query_norm(q), here), self.position(self.key_norm(k), here), v

    def rules(self, ctx: Context) -> Rules:
        """Mask and score function when nothing is cached."""
        return Rules(self.score, self.mask, ctx.positions, ctx.positions, ctx.segments, ctx.segments)


class CrossAttention(nn.Module):
    """Attention with keys and values from ctx.memory (B, S, D). Stream (B, T, D) -> (B, T, D).

    A query whose memory is fully masked gets the output projection of zeros.
    """

    def __init__(self, dim: int, *, heads: int = 4, project: Part = part(Projections), kernel: Part = part(attend)):
        super().__init__()
        self.project = project(dim, heads)
        self.kernel = kernel

    def forward(self, x: Stream, ctx: Context) -> Stream:
        keys = placed(ctx.memory, ctx.memory_place)
        q, k, v = self.project.split(placed(x, ctx.place), keys, ctx.memory)
        # without a memory mask every query attends to every position of the memory
        seen = part(everywhere) if ctx.memory_seen is None else among(ctx.memory_seen)
        # a memory without segments is seen by every segment of the stream
        segments = None if ctx.memory_segments is None else ctx.segments
        rules = Rules(mask=seen, q_segments=segments, k_segments=ctx.memory_segments)
        return self.project.join(self.kernel(q, k, v, rules))
