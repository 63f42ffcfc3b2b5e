"""Flex Attention: A Programming Model for Generating Optimized Attention Kernels.
Dong, Feng, Guessous, Liang, He, 2024. arXiv:2412.05496

FlashAttention, but score_mod and mask_mod are functions, and a block mask skips empty tiles and unmasks full ones.

A hand-written kernel serves one variant of attention. Here a variant is two functions of example, head and two
positions, and one template calls both. A block mask sorts tiles into empty (never loaded), full (the mask is not
evaluated) and partial. The paper compiles the kernel; here the tiles are walked in Python, which shows exactness and
the number of tiles skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import Part, paper, part
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import Scheme, flash, recompute
from deltax.papers.systems.attention_kernels.memory_efficient_attention import attend_tile, finish, merge
from deltax.papers.systems.attention_kernels.online_softmax import log_sum, relative
from deltax.parts.attention.scores import Rules, everywhere
from deltax.parts.attention.tiles import tiles, wide
from deltax.shapes import Heads, Keys, Queries, Scores, Values

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_attention(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 128) -> Heads:
    """`attend` by blocks of `tile` queries and keys; its rules are the paper's score_mod and mask_mod.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients reach q, k, v and
    the parameters of a score that is a module. Raises UserError for a tile below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_forward, _weights))


flex_attention.reference = attend  # the same function; FLOPs are counted on it


@paper(on=flash, arxiv="2412.05496", year=2024)
def flex(recipe: Part, *, tile: int = 128) -> Part:
    tiles(0, tile)  # raises here, not at build, for a tile below 1
    return recipe.fill("kernel", flex_attention, tile=tile)


class BlockMask(NamedTuple):
    """For each block of queries, the indices of its partial and of its full blocks of keys (section 3.3)."""

    partial: tuple[tuple[int, ...], ...]
    full: tuple[tuple[int, ...], ...]

    def visited(self) -> int:
        """Number of tiles computed."""
        return sum(map(len, self.partial)) + sum(map(len, self.full))


def block_mask(q: Queries, k: Keys, rules: Rules, tile: int) -> BlockMask:
    """Evaluates the mask once on every pair, over all examples and heads. Reads only the shapes of q and k."""
    some, whole = [], []
    for rows in tiles(q.shape[1], tile):
        seen = [rules.allowed(q, k, rows, columns) for columns in tiles(k.shape[1], tile)]
        # partial: some pairs allowed; full: all; neither: the tile is never loaded
        some.append(tuple(i for i, x in enumerate(seen) if x.any() and not x.all()))
        whole.append(tuple(i for i, x in enumerate(seen) if x.all()))
    return BlockMask(tuple(some), tuple(whole))


def _forward(
    q: Queries, k: Keys, v: Values, rules: Rules, tile: int, blocks: BlockMask | None = None
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, K) and log-sum-exp L (B, H, T), block by block (Algorithm 1)."""
    blocks = blocks or block_mask(q, k, rules, tile)
    columns, free = list(tiles(k.shape[1], tile)), unmasked(rules)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    log = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    for i, rows in enumerate(tiles(q.shape[1], tile)):
        look = lambda how, j: attend_tile(q[:, rows], k[:, columns[j]], v[:, columns[j]], how, rows, columns[j])  # noqa: B023
        # full tiles without the mask, partial tiles with it; empty tiles in neither list
        found = [*map(partial(look, free), blocks.full[i]), *map(partial(look, rules), blocks.partial[i])]
        if found:
            all_ = reduce(merge, found)
            out[:, rows], log[..., rows] = finish(all_), log_sum(all_.seen)
    return out, log


def _weights(scores: Scores, log: Tensor) -> Tensor:
    return relative(scores, log[..., None])  # P = exp(S - L)


def unmasked(rules: Rules) -> Rules:
    """The score without the mask, for full tiles."""
    return replace(rules, mask=part(everywhere), q_segments=None, k_segments=None)


def both(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, masks: tuple[Mask, ...]) -> Tensor:
    """A pair is allowed where all of these masks allow it (section 3.1, and_masks)."""
    return reduce(torch.logical_and, (mask(b, h, q, k) for mask in masks))


def either(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, masks: tuple[Mask, ...]) -> Tensor:
    """A pair is allowed where one of these masks allows it (section 3.1, or_masks)."""
    return reduce(torch.logical_or, (mask(b, h, q, k) for mask in masks))


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, length: int) -> Tensor:
    """Every query attends to the first `length` positions."""
    return (k < length).expand(torch.broadcast_shapes(q.shape, k.shape))


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    """Packed documents of these lengths; each attends to itself only."""
    ends = torch.tensor(lengths, device=q.device).cumsum(0)
    # the document index of a position is the number of ends at or below it
    return torch.bucketize(q, ends, right=True) == torch.bucketize(k, ends, right=True)


def soft_cap(scores: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, cap: float = 20.0) -> Tensor:
    """cap * tanh(scores / cap), for a tensor of scores or, as torch calls a score_mod, for one score."""
    return cap * torch.tanh(scores / cap)


def paged(rules: Rules, tables: Sequence[Sequence[int]], lengths: Sequence[int], size: int, count: int) -> Rules:
    """Rules over a store of `count` pages of `size` positions, where example i has `lengths[i]` positions in
    `tables[i]`.

    Score and mask are called with the logical position of a key in its example, not with its physical position.
    """
    # (examples, count * size): the logical position of each physical one, -1 for pages of other examples
    logical = torch.full((len(tables), count * size), -1)
    for row, table, length in zip(logical, tables, lengths, strict=True):
        at = torch.arange(length)
        row[torch.tensor(table, dtype=torch.int64)[at // size] * size + at % size] = at

    def where(b: Tensor, k: Tensor) -> Tensor:
        return logical.to(k.device)[b, k]

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # masked pages are empty tiles, so they are skipped
        return (where(b, k) >= 0) & rules.mask(b, h, q, where(b, k))

    def score(scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        return rules.score(scores, b, h, q, where(b, k))

    return replace(rules, score=score, mask=mask)
