"""Learning CUDA by optimizing softmax: A worklog. Pandya, 2025. https://maharshi.bearblog.dev/optimizing-softmax-cuda/

An online softmax, but one row is shared out to the threads of a block, whose pairs merge by shuffles.

Safe softmax reads a row three times. Keeping maximum and sum together saves one read; the rest of the way is about how
threads that have each seen a part of the row put their pairs together: through shared memory in halves, or inside a
warp by exchanging registers, with one pair a warp left for shared memory. Four numbers are loaded at a time. Any of
these orders is right because the merge is associative and commutative. Here they are run in torch, a place of a tensor
for each thread; the kernel itself is `deltax.kernels.triton_softmax`.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.papers.systems.attention_kernels.online_softmax import Seen, look, merge, relative
from deltax.papers.systems.attention_kernels.online_softmax import softmax as online

WARP, VECTOR = 32, 4  # threads that can read each other's registers; numbers in one load


def share_out(scores: Tensor, threads: int) -> Tensor:
    """What each thread reads: four neighbours at a time, the next four being the next thread's.

    (..., S) -> (..., threads, n); places past the end hold -inf.
    """
    length = scores.shape[-1]
    whole = -(-length // (threads * VECTOR)) * threads * VECTOR
    padded = torch.nn.functional.pad(scores, (0, whole - length), value=-torch.inf)
    return padded.unflatten(-1, (-1, threads, VECTOR)).transpose(-3, -2).flatten(-2)


def exchange(seen: Seen, bit: int) -> Seen:
    """Each thread merges its pair with that of the thread whose number differs in this bit. Two (..., threads)."""
    partner = torch.arange(seen.max.shape[-1], device=seen.max.device) ^ bit
    return merge(seen, Seen(*(x[..., partner] for x in seen)))


def shuffle(seen: Seen) -> Seen:
    """Exchanges over every bit of a warp. Two (..., n), n a power of two -> the pair of all n, held by every thread."""
    bits = seen.max.shape[-1].bit_length() - 1
    return reduce(exchange, (1 << i for i in reversed(range(bits))), seen)


def halve(seen: Seen) -> Seen:
    """Through shared memory: the lower half of the threads merges in the upper half's pairs, until one is left.

    Two (..., threads) -> two (..., 1).
    """
    while (half := seen.max.shape[-1] // 2) > 0:
        seen = merge(Seen(*(x[..., :half] for x in seen)), Seen(*(x[..., half:] for x in seen)))
    return seen


def in_warps(seen: Seen) -> Seen:
    """Shuffles in each warp, then one warp shuffles the warps' pairs. Two (..., threads) -> two (..., 1)."""
    each = shuffle(Seen(*(x.unflatten(-1, (-1, WARP)) for x in seen)))
    whole = shuffle(Seen(*(x[..., 0] for x in each)))
    return Seen(*(x[..., :1] for x in whole))


@paper(on=online, year=2025, url="https://maharshi.bearblog.dev/optimizing-softmax-cuda/")
def softmax(scores: Tensor, *, threads: int = 256, reduction: Callable[[Seen], Seen] = in_warps) -> Tensor:
    """Softmax over the last axis by a block of threads a row. Any shape; zeros for a row that is -inf throughout.

    `reduction` makes one pair of the threads' pairs: `halve` or `in_warps`. Raises UserError unless threads are a power
    of two from 32 to 1024, as a block has them.
    """
    if threads not in (32, 64, 128, 256, 512, 1024):
        raise UserError(f"a block has a power of two of threads: give 32, 64, ... or 1024, not {threads}")
    pieces = share_out(scores, threads)
    seen = reduction(reduce(merge, map(look, pieces.split(VECTOR, -1))))
    return relative(scores, seen.max) / seen.sum.masked_fill(seen.sum == 0, 1.0)
