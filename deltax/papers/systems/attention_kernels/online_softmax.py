"""Online normalizer calculation for softmax. Milakov, Gimelshein, 2018. arXiv:1805.02867

A softmax, but its maximum and its normaliser are found together, so the scores are read once less.

What has been seen so far is two numbers, the largest score and the sum of exponentials relative to it, and two such
pairs merge into the pair of their union. The merge is associative and commutative: any order, any grouping, any place.
Everything that descends from this paper is a choice of order, grouping and place.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import softmax_attention


class Seen(NamedTuple):
    """The largest score so far, and the sum of exp(score - largest). Before any score: (-inf, 0), the merge's identity.

    No gradient flows through the largest score: it is a point of reference, and all that is computed relative to it
    has the same value wherever it lies.
    """

    max: Tensor
    sum: Tensor


def relative(x: Tensor, largest: Tensor) -> Tensor:
    """exp(x - largest) for x <= largest; 0 where both are -inf, where the difference is not a number."""
    return torch.exp(x - largest.masked_fill(largest.isneginf(), 0.0))


def look(scores: Tensor) -> Seen:
    """What one block of scores has to say. (..., S) -> two tensors (...). S is at least 1."""
    largest = scores.detach().amax(-1)
    return Seen(largest, relative(scores, largest[..., None]).sum(-1))


def merge(a: Seen, b: Seen) -> Seen:
    """What two blocks say together (section 3.1, Eq. 4)."""
    largest = torch.maximum(a.max, b.max)
    return Seen(largest, a.sum * relative(a.max, largest) + b.sum * relative(b.max, largest))


def log_sum(seen: Seen) -> Tensor:
    """The logarithm of the sum of exp(score), -inf where nothing but -inf was seen."""
    return seen.max + seen.sum.log()


@paper(on=softmax_attention, year=2018, arxiv="1805.02867")
def softmax(scores: Tensor, *, block: int = 64) -> Tensor:
    """Softmax over the last axis, `block` scores at a time (Algorithm 3): one read to look, one to divide. Any shape.

    A row that is -inf throughout gives zeros. Raises UserError for a block below 1.
    """
    if block < 1:
        raise UserError(f"block is how many scores are read together: give at least 1, not {block}")
    seen = reduce(merge, map(look, scores.split(block, -1)))
    divisor = _or_one(seen.sum)[..., None]
    return torch.cat([relative(piece, seen.max[..., None]) / divisor for piece in scores.split(block, -1)], -1)


def top_k(scores: Tensor, k: int, *, block: int = 64) -> tuple[Tensor, Tensor]:
    """The k largest softmax values and where they stand, in one read (Algorithm 4). (..., S) -> two of (..., k)."""
    seen, start = None, 0
    best = torch.empty_like(scores[..., :0])
    where = torch.empty_like(best, dtype=torch.int64)
    for piece in scores.split(block, -1):
        seen = look(piece) if seen is None else merge(seen, look(piece))
        here = torch.arange(start, start + piece.shape[-1], device=piece.device).expand_as(piece)
        candidates, places = torch.cat([best, piece], -1), torch.cat([where, here], -1)
        best, kept = candidates.topk(min(k, candidates.shape[-1]), -1)
        where, start = places.gather(-1, kept), start + piece.shape[-1]
    return relative(best, seen.max[..., None]) / _or_one(seen.sum)[..., None], where


def _or_one(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)
