"""Flex Attention: A Programming Model for Generating Optimized Attention Kernels.
Dong, Feng, Guessous, Liang, He, 2024. arXiv:2412.05496

FlashAttention-2, but a variant of attention is two small functions, and a mask made once for blocks says which tiles to
skip and which need no mask.

A kernel by hand serves one variant; people want a window with a bias in packed documents. Score and mask are functions
of example, head and two positions, and one template has a place for both. A block mask sorts tiles by what the mask
lets through: nothing, and the tile is never loaded; all, and the mask is never asked; or some. In the paper a compiler
writes the kernel; here the tiles are walked in Python, to show that it is exact and how much is skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltax import Part, paper, part
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import Scheme, recompute
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_2
from deltax.papers.systems.attention_kernels.memory_efficient_attention import attend_tile, finish, merge
from deltax.papers.systems.attention_kernels.online_softmax import log_sum, relative
from deltax.parts.attention.scores import Rules, causal, everywhere, window
from deltax.parts.attention.tiles import tiles, wide
from deltax.shapes import Heads, Keys, Queries, Scores, Values

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def both(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, masks: tuple[Mask, ...]) -> Tensor:
    """A query sees a key where every one of these masks lets it (section 3.1, and_masks)."""
    return reduce(torch.logical_and, (mask(b, h, q, k) for mask in masks))


def either(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, masks: tuple[Mask, ...]) -> Tensor:
    """A query sees a key where one of these masks lets it (section 3.1, or_masks)."""
    return reduce(torch.logical_or, (mask(b, h, q, k) for mask in masks))


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, length: int) -> Tensor:
    """All see the first `length` positions."""
    return (k < length).expand(torch.broadcast_shapes(q.shape, k.shape))


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    """Documents of these lengths stand one after the other, and each sees itself only."""
    ends = torch.tensor(lengths, device=q.device).cumsum(0)
    return torch.bucketize(q, ends, right=True) == torch.bucketize(k, ends, right=True)


def soft_cap(scores: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, cap: float = 20.0) -> Tensor:
    """Scores, all or one at a time as torch hands them over, bent to stay within +-cap."""
    return cap * torch.tanh(scores / cap)


class BlockMask(NamedTuple):
    """For each block of queries, the blocks of keys that it sees in part, and those it sees whole (section 3.3)."""

    partial: tuple[tuple[int, ...], ...]
    full: tuple[tuple[int, ...], ...]

    def visited(self) -> int:
        """How many tiles are computed."""
        return sum(map(len, self.partial)) + sum(map(len, self.full))


def block_mask(q: Queries, k: Keys, rules: Rules, tile: int) -> BlockMask:
    """Asks the mask once about every pair, over all examples and heads at once. Reads shapes of q and k only."""
    some, whole = [], []
    for rows in tiles(q.shape[1], tile):
        seen = [rules.allowed(q, k, rows, columns) for columns in tiles(k.shape[1], tile)]
        some.append(tuple(i for i, x in enumerate(seen) if x.any() and not x.all()))
        whole.append(tuple(i for i, x in enumerate(seen) if x.all()))
    return BlockMask(tuple(some), tuple(whole))


def unmasked(rules: Rules) -> Rules:
    """The score alone, for tiles that are seen whole."""
    return replace(rules, mask=part(everywhere), q_segments=None, k_segments=None)


def paged(rules: Rules, tables: Sequence[Sequence[int]], lengths: Sequence[int], size: int, count: int) -> Rules:
    """The rules over a store of `count` pages of `size` positions, where example i has `lengths[i]` in `tables[i]`.

    Score and mask are asked with the position that a key has in its example, and not with where it lies. Pages of
    others are masked, so block by block they are never read.
    """
    logical = torch.full((len(tables), count * size), -1)
    for row, table, length in zip(logical, tables, lengths, strict=True):
        at = torch.arange(length)
        row[torch.tensor(table, dtype=torch.int64)[at // size] * size + at % size] = at

    def where(b: Tensor, k: Tensor) -> Tensor:
        return logical.to(k.device)[b, k]

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (where(b, k) >= 0) & rules.mask(b, h, q, where(b, k))

    def score(scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        return rules.score(scores, b, h, q, where(b, k))

    return replace(rules, score=score, mask=mask)


def _forward(
    q: Queries, k: Keys, v: Values, rules: Rules, tile: int, blocks: BlockMask | None = None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: full tiles without the mask, partial ones with it. -> output, and log-sum-exp (B, H, T)."""
    blocks = blocks or block_mask(q, k, rules, tile)
    columns, free = list(tiles(k.shape[1], tile)), unmasked(rules)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    log = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    for i, rows in enumerate(tiles(q.shape[1], tile)):
        look = lambda how, j: attend_tile(q[:, rows], k[:, columns[j]], v[:, columns[j]], how, rows, columns[j])  # noqa: B023
        found = [*map(partial(look, free), blocks.full[i]), *map(partial(look, rules), blocks.partial[i])]
        if found:
            all_ = reduce(merge, found)
            out[:, rows], log[..., rows] = finish(all_), log_sum(all_.seen)
    return out, log


def _weights(scores: Scores, log: Tensor) -> Tensor:
    return relative(scores, log[..., None])


def flex_attention(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 128) -> Heads:
    """`attend`, its rules the score_mod and mask_mod of the paper, by blocks of `tile` queries and keys.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients reach q, k, v and
    the parameters of a score that is a module. Raises UserError for a tile below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_forward, _weights))


flex_attention.reference = attend  # the same function of its arguments: what FLOPs are counted on


@paper(on=flash_2, arxiv="2412.05496", year=2024)
def flex(recipe: Part, *, tile: int = 128) -> Part:
    tiles(0, tile)  # refuses a tile below 1 where it is written
    return recipe.fill("kernel", flex_attention, tile=tile)


def masks() -> list[Any]:
    """One of each kind, with sizes that fill no tile."""
    return [
        part(causal),
        part(window, width=9),
        part(prefix, length=21),
        part(documents, lengths=(5, 29, 30)),
    ]
