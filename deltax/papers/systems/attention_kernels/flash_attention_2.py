"""FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning. Dao, 2023. arXiv:2307.08691

FlashAttention, but queries are the outer loop, so each tile of them owns its output: nobody waits for another, and it
is divided once.

The loops change places, and with that the output of a tile of queries never leaves fast memory until it is finished:
one scaling a visit instead of two, one division at the end instead of one a visit, and tiles of queries that run in
parallel however long the sequence and however few the heads. Of the two numbers a row only their log-sum is kept.
"""

from functools import reduce

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import Scheme, flash, recompute
from deltax.papers.systems.attention_kernels.memory_efficient_attention import Tile, finish, gather
from deltax.papers.systems.attention_kernels.online_softmax import Seen, log_sum, relative
from deltax.parts.attention.scores import Rules
from deltax.parts.attention.tiles import over_heads, tile_scores, tiles, wide
from deltax.shapes import Heads, Keys, Queries, Scores, Values


def look_on(held: Tile, scores: Scores, v: Values) -> Tile:
    """What queries have seen so far, and of one more tile of keys (Algorithm 1, lines 8 to 10).

    `merge` with the tile, which is looked at relative to the maximum of both, so that only the held output is scaled.
    """
    largest = torch.maximum(held.seen.max, scores.detach().amax(-1))
    weights, shrink = relative(scores, largest[..., None]), relative(held.seen.max, largest)
    out = held.out * over_heads(shrink) + gather(weights, v)
    return Tile(Seen(largest, held.seen.sum * shrink + weights.sum(-1)), out)


def look_at_all(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> Tile:
    """Every tile of queries past the keys that it may look at, one tile after the other: undivided, for all queries."""
    return _joined([_own(q, k, v, rules, rows, tile) for rows in tiles(q.shape[1], tile)] or [nothing(q)])


def _own(q: Queries, k: Keys, v: Values, rules: Rules, rows: slice, tile: int) -> Tile:
    visible = (c for c in tiles(k.shape[1], tile) if rules.allowed(q, k, rows, c).any())
    own = q[:, rows]
    look = lambda held, c: look_on(held, tile_scores(own, k[:, c], rules, rows, c), v[:, c])
    return reduce(look, visible, nothing(own))


def nothing(q: Queries) -> Tile:
    """What these queries have seen of no keys: the identity of `merge`."""
    largest = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    return Tile(Seen(largest, torch.zeros_like(largest)), torch.zeros_like(q, dtype=wide(q)))


def _joined(parts: list[Tile]) -> Tile:
    largest, total = (torch.cat([tile.seen[i] for tile in parts], -1) for i in (0, 1))
    return Tile(Seen(largest, total), torch.cat([tile.out for tile in parts], 1))


def _owned(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> tuple[Tensor, Tensor]:
    whole = look_at_all(q, k, v, rules, tile)
    return finish(whole).to(q.dtype), log_sum(whole.seen)


def softmax_given(scores: Scores, total: Tensor) -> Tensor:
    """The softmax of some of a row's scores (B, H, T, S), given the log-sum of all of them (B, H, T)."""
    return relative(scores, total[..., None])


def flash_attention_2(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 64) -> Heads:
    """`attend`, tile by tile: keeps for the backward pass its arguments, its output and one number a row of scores.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients as those of
    `flash_attention`; the backward pass goes over tiles of keys, as there. Raises UserError for a tile below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_owned, softmax_given))


flash_attention_2.reference = attend  # the same function of its arguments: what FLOPs are counted on


@paper(on=flash, arxiv="2307.08691", year=2023)
def flash_2(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # refuses a tile below 1 where it is written
    return recipe.fill("kernel", flash_attention_2, tile=tile)
