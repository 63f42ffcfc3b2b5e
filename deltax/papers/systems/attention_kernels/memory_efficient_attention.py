"""Self-attention Does Not Need O(n^2) Memory. Rabe, Staats, 2021. arXiv:2112.05682

An online softmax, but chunks of weighted values merge with it, and activation checkpointing recomputes their scores.

Softmax divides by a sum over all keys, and the division can be done last. A chunk of keys is summarised for a chunk of
queries by its maximum score, its sum of exponentials and its weighted values; summaries merge as in online softmax.
The paper checkpoints the summary of each chunk of keys and keeps the summaries. Here each chunk of queries is
checkpointed too, so that only the arguments are kept.
"""

from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels import online_softmax
from deltax.papers.systems.attention_kernels.online_softmax import Seen, look, relative, softmax
from deltax.papers.systems.performance.activation_checkpointing import activation_checkpointing, checkpoint
from deltax.parts.attention.scores import Rules
from deltax.parts.attention.tiles import as_autocast, over_heads, spread, tile_scores, tiles
from deltax.shapes import Heads, Keys, Queries, Values


def memory_efficient_attention(
    q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, queries: int = 16, keys: int = 64
) -> Heads:
    """`attend`, one chunk of queries and keys at a time. Keeps only its arguments for the backward pass.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). The paper's chunks have 1024
    queries and 4096 keys. Gradients reach q, k, v and the parameters of a score that is a module. Raises UserError for
    a chunk below 1.
    """
    rules = rules or Rules()
    q, k, v = as_autocast(q, k, v)
    if not (q.shape[1] and k.shape[1]):
        return attend(q, k, v, rules)  # no chunk to go over
    learned = rules.learned.values()
    chunks = [checkpoint(partial(_rows, rules, r, keys), q[:, r], k, v, *learned) for r in tiles(q.shape[1], queries)]
    return torch.cat(chunks, 1).to(q.dtype)


memory_efficient_attention.reference = attend  # the same function; FLOPs are counted on it


@paper(on=(softmax, activation_checkpointing), arxiv="2112.05682", year=2021)
def memory_efficient(recipe: Part, *, queries: int = 16, keys: int = 64) -> Part:
    tiles(0, min(queries, keys))  # raises here, not at build, for a chunk below 1
    return recipe.fill("kernel", memory_efficient_attention, queries=queries, keys=keys)


class Tile(NamedTuple):
    """The attention of some queries to some keys before division: `seen` is m and d (B, H, T), `out` is (B, T, H,
    K).
    """

    seen: Seen
    out: Tensor


def attend_tile(
    q: Queries, k: Keys, v: Values, rules: Rules, rows: slice = slice(None), columns: slice = slice(None)
) -> Tile:
    """One tile: queries (B, T, H, K), keys and values (B, S, G, K). `rows` and `columns` are its place in the whole.

    Statistics and output are in float32 at least.
    """
    scores = tile_scores(q, k, rules, rows, columns)  # (B, H, T, S)
    seen = look(scores)  # m and d, each (B, H, T)
    return Tile(seen, gather(relative(scores, seen.max[..., None]), v))


def gather(weights: Tensor, v: Values) -> Heads:
    """Values (B, S, G, K) times weights (B, H, T, S), in the dtype of the weights. -> (B, T, H, K)."""
    return torch.einsum("bhts,bshk->bthk", weights.to(v.dtype), spread(v, weights.shape[1])).to(weights.dtype)


def merge(a: Tile, b: Tile) -> Tile:
    """Tiles of the same queries merge as in online softmax, outputs rescaled to the larger maximum (section 2)."""
    # m = max(m_a, m_b); out = out_a e^(m_a - m) + out_b e^(m_b - m)
    seen = online_softmax.merge(a.seen, b.seen)
    rescale = lambda tile: tile.out * over_heads(relative(tile.seen.max, seen.max))
    return Tile(seen, rescale(a) + rescale(b))


def finish(tile: Tile) -> Heads:
    """out / d, the only division. A query that attends to no key gets zeros. -> (B, T, H, K)."""
    total = over_heads(tile.seen.sum)
    return tile.out / total.masked_fill(total == 0, 1.0)


def _rows(rules: Rules, rows: slice, keys: int, q: Queries, k: Keys, v: Values, *learned: Tensor) -> Heads:
    """One chunk of queries against all keys."""
    # checkpointed twice: `queries` keeps no summary, `keys` keeps one chunk's scores at a time
    summaries = (
        checkpoint(partial(_summary, rules, rows, columns), q, k[:, columns], v[:, columns], *learned)
        for columns in tiles(k.shape[1], keys)
    )
    return finish(reduce(merge, (Tile(Seen(largest, total), out) for largest, total, out in summaries)))


def _summary(rules: Rules, rows: slice, columns: slice, q: Queries, k: Keys, v: Values, *learned: Tensor) -> tuple:
    tile = attend_tile(q, k, v, rules.holding(learned), rows, columns)
    return *tile.seen, tile.out
