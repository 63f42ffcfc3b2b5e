"""FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning. Dao, 2023. arXiv:2307.08691

FlashAttention, but queries are the outer loop, so a tile's output stays in fast memory and is divided once.

With the loops exchanged, each visit rescales an output once instead of twice, and one division at the end replaces one
at every visit. Tiles of queries run in parallel, which fills a GPU also for long sequences with few heads. Only the
log-sum-exp of each row is saved.
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


def flash_attention_2(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 64) -> Heads:
    """`attend`, tile by tile. Saves its arguments, its output and one number a row (L) for the backward pass.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients and their order of
    tiles are those of `flash_attention`. Raises UserError for a tile below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_owned, softmax_given))


flash_attention_2.reference = attend  # the same function; FLOPs are counted on it


@paper(on=flash, arxiv="2307.08691", year=2023)
def flash_2(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # raises here, not at build, for a tile below 1
    return recipe.fill("kernel", flash_attention_2, tile=tile)


def look_on(held: Tile, scores: Scores, v: Values) -> Tile:
    """Adds one tile of keys, scores (B, H, T, S) and values (B, S, G, K), to a held tile (Algorithm 1, lines 8 to
    10).
    """
    # m = max(m_held, rowmax S)
    largest = torch.maximum(held.seen.max, scores.detach().amax(-1))
    weights, shrink = relative(scores, largest[..., None]), relative(held.seen.max, largest)
    # P = exp(S - m) needs no rescaling: only the held output is multiplied
    out = held.out * over_heads(shrink) + gather(weights, v)
    return Tile(Seen(largest, held.seen.sum * shrink + weights.sum(-1)), out)


def look_at_all(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> Tile:
    """Undivided outputs and statistics of all queries, one tile of queries after the other."""
    return _joined([_own(q, k, v, rules, rows, tile) for rows in tiles(q.shape[1], tile)] or [nothing(q)])


def _own(q: Queries, k: Keys, v: Values, rules: Rules, rows: slice, tile: int) -> Tile:
    # tiles of keys with no visible pair are skipped
    visible = (c for c in tiles(k.shape[1], tile) if rules.allowed(q, k, rows, c).any())
    own = q[:, rows]
    look = lambda held, c: look_on(held, tile_scores(own, k[:, c], rules, rows, c), v[:, c])
    return reduce(look, visible, nothing(own))


def nothing(q: Queries) -> Tile:
    """The tile of no keys: the merge's identity. Queries (B, T, H, K)."""
    largest = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    return Tile(Seen(largest, torch.zeros_like(largest)), torch.zeros_like(q, dtype=wide(q)))


def _joined(parts: list[Tile]) -> Tile:
    largest, total = (torch.cat([tile.seen[i] for tile in parts], -1) for i in (0, 1))
    return Tile(Seen(largest, total), torch.cat([tile.out for tile in parts], 1))


def _owned(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> tuple[Tensor, Tensor]:
    whole = look_at_all(q, k, v, rules, tile)
    # L = m + log l
    return finish(whole).to(q.dtype), log_sum(whole.seen)


def softmax_given(scores: Scores, total: Tensor) -> Tensor:
    """exp(S - L): the softmax of some scores (B, H, T, S) of rows with log-sum L (B, H, T)."""
    return relative(scores, total[..., None])
