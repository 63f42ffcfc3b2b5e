"""Online normalizer calculation for softmax. Milakov, Gimelshein, 2018. arXiv:1805.02867

A softmax, but maximum and normaliser are updated together in one pass, so the scores are read twice, not thrice.

A block of scores is summarised by two numbers: its maximum m, and d, the sum of exp(score - m). Two such pairs merge
into the pair of both blocks. The merge is associative and commutative, so blocks may be read in any order, in any
grouping, on any device. FlashAttention and its successors differ in that order, grouping and device.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import softmax_attention


class Seen(NamedTuple):
    """Maximum m of some scores, and sum d of exp(score - m), each (...). Of no scores: (-inf, 0), the merge's identity.

    No gradient flows through the maximum: the softmax and the log-sum do not depend on its value.
    """

    max: Tensor
    sum: Tensor


@paper(on=softmax_attention, year=2018, arxiv="1805.02867")
def softmax(scores: Tensor, *, block: int = 64) -> Tensor:
    """Softmax over the last axis, `block` scores at a time (Algorithm 3), in two reads of the scores. Any shape.

    A row that is -inf throughout gives zeros. Raises UserError for a block below 1.
    """
    if block < 1:
        raise UserError(f"block is the number of scores read at a time: choose at least 1, not {block}")
    seen = reduce(merge, map(look, scores.split(block, -1)))  # first read
    # second read: y_i = exp(x_i - m) / d
    divisor = _or_one(seen.sum)[..., None]
    return torch.cat([relative(piece, seen.max[..., None]) / divisor for piece in scores.split(block, -1)], -1)


def look(scores: Tensor) -> Seen:
    """Maximum and sum of one block of scores. (..., S) -> two tensors (...). S is at least 1."""
    largest = scores.detach().amax(-1)  # detached: the softmax does not depend on it
    return Seen(largest, relative(scores, largest[..., None]).sum(-1))


def merge(a: Seen, b: Seen) -> Seen:
    """Maximum and sum of the union of two blocks (section 3.1, Eq. 4)."""
    # Eq. 4: m = max(m_a, m_b), d = d_a e^(m_a - m) + d_b e^(m_b - m)
    largest = torch.maximum(a.max, b.max)
    return Seen(largest, a.sum * relative(a.max, largest) + b.sum * relative(b.max, largest))


def relative(x: Tensor, largest: Tensor) -> Tensor:
    """exp(x - largest) for x <= largest; 0 where both are -inf, where the difference is not a number."""
    # -inf - (-inf) is NaN: a fully masked row is compared with 0 instead
    return torch.exp(x - largest.masked_fill(largest.isneginf(), 0.0))


def log_sum(seen: Seen) -> Tensor:
    """log(sum of exp(score)) = m + log d, and -inf where every score was -inf."""
    return seen.max + seen.sum.log()


def top_k(scores: Tensor, k: int, *, block: int = 64) -> tuple[Tensor, Tensor]:
    """The k largest softmax values and their indices, in one read (Algorithm 4). (..., S) -> two of (..., k)."""
    seen, start = None, 0
    best = torch.empty_like(scores[..., :0])
    where = torch.empty_like(best, dtype=torch.int64)
    for piece in scores.split(block, -1):
        seen = look(piece) if seen is None else merge(seen, look(piece))
        here = torch.arange(start, start + piece.shape[-1], device=piece.device).expand_as(piece)
        # the k best so far compete with the block that was just read
        candidates, places = torch.cat([best, piece], -1), torch.cat([where, here], -1)
        best, kept = candidates.topk(min(k, candidates.shape[-1]), -1)
        where, start = places.gather(-1, kept), start + piece.shape[-1]
    return relative(best, seen.max[..., None]) / _or_one(seen.sum)[..., None], where


def _or_one(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)
