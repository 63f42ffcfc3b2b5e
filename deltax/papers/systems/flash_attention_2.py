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
from torch.utils._python_dispatch import TorchDispatchMode

from deltax import Part, claim, paper, part
from deltax.papers.language.softmax_attention import attend
from deltax.papers.systems.flash_attention import Scheme, flash, flash_attention, recompute
from deltax.papers.systems.memory_efficient_attention import Tile, finish, gather
from deltax.papers.systems.online_softmax import Seen, log_sum, relative
from deltax.parts.agreement import is_attention
from deltax.parts.scores import Rules, causal, everywhere, window
from deltax.parts.tiles import over_heads, tile_scores, tiles, wide
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


@claim
def it_is_attention():
    """Whatever the tile and the rules of who sees whom, output and gradients are attention's, at any length."""
    is_attention(lambda tile: part(flash_attention_2, tile=tile), attend)


@claim
def the_output_is_scaled_once_a_visit():
    """FlashAttention scales or divides an output twice a visit after the first, version 2 once, and once at the end."""
    q, k, v = torch.randn(3, 1, 64, 3, 4, dtype=torch.float64)
    for mask, visits in ((everywhere, 64), (causal, 36), (part(window, width=8), 15)):
        rules, owners = Rules(mask=part(mask)), 8
        counts = []
        for kernel in (flash_attention, flash_attention_2):
            with _Scalings((1, 8, 3, 4), (1, 64, 3, 4)) as scalings, torch.no_grad():
                kernel(q, k, v, rules, tile=8)
            counts.append(scalings.tiles)
        assert counts == [owners + 2 * (visits - owners), visits + owners]


@claim
def tiles_in_the_future_are_not_visited():
    """Under the causal mask n (n + 1) / 2 of n x n tiles are read, near half; the rest may hold anything."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 2, 4, dtype=torch.float64)
    rules = Rules(mask=part(causal))
    right = attend(q, k, v, rules)
    for i, rows in enumerate(tiles(64, 8)):
        unread = k.clone(), v.clone()
        for t in unread:
            t[:, 8 * (i + 1) :] = torch.nan
        torch.testing.assert_close(finish(_own(q, *unread, rules, rows, 8)), right[:, rows], rtol=1e-12, atol=1e-12)


class _Scalings(TorchDispatchMode):
    """Counts the multiplications and divisions, elementwise, of tiles of output; one of the `whole` counts for all."""

    def __init__(self, tile: tuple[int, ...], whole: tuple[int, ...]):
        super().__init__()
        self.tile, self.whole, self.tiles = tile, whole, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
            self.tiles += {self.tile: 1, self.whole: self.whole[1] // self.tile[1]}.get(tuple(out.shape), 0)
        return out
