"""FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness.
Dao, Fu, Ermon, Rudra, Ré, 2022. arXiv:2205.14135

Softmax attention, but tiles fit in fast memory, and the backward pass recomputes weights from saved row statistics.

Attention is limited by memory traffic: its T x T matrix is written and read again by every step from scores to output.
Tiles that fit in fast memory avoid the matrix. Keys and values are the outer loop, each loaded once; the divided output
of a tile of queries is read and written at every visit. The loops are written in Python, which shows exactness, traffic
and memory, not speed: `torch` and `deltax.kernels` have fused kernels.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax import Part, paper
from deltax.papers.language.attention.softmax_attention import attend, softmax_attention
from deltax.papers.systems.attention_kernels import online_softmax
from deltax.papers.systems.attention_kernels.memory_efficient_attention import Tile, attend_tile, finish
from deltax.papers.systems.attention_kernels.online_softmax import relative, softmax
from deltax.papers.systems.performance.activation_checkpointing import activation_checkpointing
from deltax.parts.attention.scores import Rules
from deltax.parts.attention.tiles import as_autocast, over_heads, spread, tile_scores, tiles, wide
from deltax.shapes import Heads, Keys, Queries, Scores, Values


def flash_attention(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 64) -> Heads:
    """`attend`, tile by tile. Saves its arguments, its output and two numbers a row (m and l) for the backward pass.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients reach q, k, v and
    the parameters of a score that is a module; second derivatives need `attend`. Raises UserError for a tile below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_folded, _weights))


flash_attention.reference = attend  # the same function; FLOPs are counted on it


@paper(on=(softmax, activation_checkpointing, softmax_attention), arxiv="2205.14135", year=2022)
def flash(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # raises here, not at build, for a tile below 1
    return recipe.fill("kernel", flash_attention, tile=tile)


def fold(q: Queries, k: Keys, v: Values, rules: Rules, done: MutableMapping, sizes: tuple[int, int]) -> None:
    """Visits every tile and leaves in `done` a divided output for each tile of queries (Algorithm 1, lines 5 to 15).

    `sizes` are a tile's queries and keys. `done` maps the index of a tile of queries to its output and statistics.
    """
    for columns in tiles(k.shape[1], sizes[1]):
        keys, values = k[:, columns], v[:, columns]
        for i, rows in enumerate(tiles(q.shape[1], sizes[0])):
            if rules.allowed(q, k, rows, columns).any():  # fully masked tiles are never loaded
                new = attend_tile(q[:, rows], keys, values, rules, rows, columns)
                done[i] = take_in(done[i], new) if i in done else Tile(new.seen, finish(new))


def take_in(held: Tile, new: Tile) -> Tile:
    """A divided output and one more tile: rescaled, added, divided again (Algorithm 1, line 12)."""
    # O = (l_held e^(m_held - m) O_held + e^(m_new - m) P V) / l
    seen = online_softmax.merge(held.seen, new.seen)
    total = seen.sum.masked_fill(seen.sum == 0, 1.0)
    share = lambda tile, sum_: over_heads(relative(tile.seen.max, seen.max) * sum_ / total)
    return Tile(seen, held.out * share(held, held.seen.sum) + new.out * share(new, 1.0))


class Scheme(NamedTuple):
    """A kernel's forward pass, and how backward recomputes the weights.

    forward(q, k, v, rules, tile) -> the output (B, T, H, K), then statistics, each (B, H, T)
    weights(scores, *statistics) -> the softmax of scores (B, H, T, S), from the statistics of its rows
    """

    forward: Callable[..., Sequence[Tensor]]
    weights: Callable[..., Tensor]


def recompute(q: Queries, k: Keys, v: Values, rules: Rules | None, tile: int, scheme: Scheme) -> Heads:
    """Attention by a scheme. Saves arguments, output and statistics for the backward pass, and no weights."""
    rules = rules or Rules()
    q, k, v = as_autocast(q, k, v)
    return _Recompute.apply(q, k, v, rules, tile, scheme, *rules.learned.values())


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules, tile: int, scheme: Scheme, *learned: Tensor
    ) -> Tensor:
        out, *statistics = scheme.forward(q, k, v, rules, tile)
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.rules, ctx.tile, ctx.scheme = rules, tile, scheme
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *statistics = ctx.saved_tensors
        weights = lambda scores, rows: ctx.scheme.weights(scores, *(s[..., rows] for s in statistics))
        d_q, d_k, d_v, *learned = gradients(q, k, v, ctx.rules, ctx.tile, weights, d_out, reached(d_out, out))
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, *learned


def reached(d_out: Heads, out: Heads) -> Tensor:
    """D = rowsum(dO * O), subtracted from dP in the softmax's gradient. -> (B, H, T), in float32 at least."""
    return (d_out.to(wide(out)) * out).sum(-1).transpose(1, 2)


def gradients(
    q: Queries,
    k: Keys,
    v: Values,
    rules: Rules,
    tile: int,
    weights: Callable[[Scores, slice], Tensor],
    d_out: Heads,
    reached: Tensor,
) -> list[Tensor]:
    """Algorithm 4, tile by tile: P is recomputed, dV = P' dO, dS = P (dO V' - D). Autograd carries dS to q, k and the
    score.

    weights(scores, rows) -> P of these rows; k and v may be a part of the keys that the rows attend to. Returns dQ, dK
    and dV in float32 at least, then the gradients of the score's learned parameters.
    """
    learned = list(rules.learned.values())
    d_q, d_k, d_v, *d_learned = (torch.zeros_like(t, dtype=wide(t)) for t in (q, k, v, *learned))
    for columns in tiles(k.shape[1], tile):
        values = spread(v[:, columns], q.shape[2])
        for rows in tiles(q.shape[1], tile):
            if not rules.allowed(q, k, rows, columns).any():
                continue
            # autograd goes from S to q, k and learned parameters: any score function has its gradient
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q[:, rows], k[:, columns])]
                scores = tile_scores(*leaves, rules, rows, columns)
            p = weights(scores.detach(), rows)  # P = exp(S - m) / l, (B, H, T, S)
            d_p = torch.einsum("bthk,bshk->bhts", d_out[:, rows], values)  # dP = dO V'
            d_values = torch.einsum("bhts,bthk->bshk", p.to(v.dtype), d_out[:, rows])  # dV = P' dO
            # (B, S, H, K) -> (B, S, G, K): heads that share a value head add up
            d_v[:, columns] += d_values.unflatten(2, (v.shape[2], -1)).sum(3)
            found = torch.autograd.grad(
                scores,
                [*leaves, *learned],
                p * (d_p - reached[..., rows, None]),  # dS = P (dP - D)
                allow_unused=True,
                materialize_grads=True,
            )
            sums = (d_q[:, rows], d_k[:, columns], *d_learned)
            for sum_, new in zip(sums, found, strict=True):
                sum_ += new
    return [d_q, d_k, d_v, *d_learned]


def _folded(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    done: dict[int, Tile] = {}
    fold(q, k, v, rules, done, (tile, tile))
    out = torch.zeros_like(q)
    largest = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    total = torch.zeros_like(largest)
    for i, rows in enumerate(tiles(q.shape[1], tile)):
        if i in done:
            out[:, rows], largest[..., rows], total[..., rows] = done[i].out, *done[i].seen
    return out, largest, total


def _weights(scores: Scores, largest: Tensor, total: Tensor) -> Tensor:
    return relative(scores, largest[..., None]) / total.masked_fill(total == 0, 1.0)[..., None]
