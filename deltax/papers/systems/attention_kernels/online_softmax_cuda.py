"""Learning CUDA by optimizing softmax: A worklog. Pandya, 2025. https://maharshi.bearblog.dev/optimizing-softmax-cuda/

An online softmax, but each row is split over a block's threads, whose (max, sum) pairs merge by warp shuffles.

Safe softmax reads a row three times, online softmax twice. The remaining kernels of the post differ in how the threads'
pairs are merged: by halving in shared memory, or by exchanging registers within a warp and leaving one pair a warp for
shared memory. Each load reads four numbers. The kernels are run here in torch, with one tensor index for each thread;
`deltax.kernels.triton_softmax` is the GPU kernel.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.papers.systems.attention_kernels.online_softmax import Seen, look, merge, relative
from deltax.papers.systems.attention_kernels.online_softmax import softmax as online

WARP, VECTOR = 32, 4  # threads of a warp; numbers in one load (float4)


def exchange(seen: Seen, bit: int) -> Seen:
    """Each thread merges its pair with that of the thread whose index differs in this bit. Two (..., threads)."""
    # __shfl_xor_sync: thread i reads the registers of thread i ^ bit
    partner = torch.arange(seen.max.shape[-1], device=seen.max.device) ^ bit
    return merge(seen, Seen(*(x[..., partner] for x in seen)))


def shuffle(seen: Seen) -> Seen:
    """Exchanges over every bit of n threads, n a power of two: all end with the merged pair. Two (..., n)."""
    # log2(n) exchanges: bits 16, 8, 4, 2, 1 for a warp of 32
    bits = seen.max.shape[-1].bit_length() - 1
    return reduce(exchange, (1 << i for i in reversed(range(bits))), seen)


def in_warps(seen: Seen) -> Seen:
    """Shuffle reduction in each warp, then over the warps. Two (..., threads) -> two (..., 1)."""
    each = shuffle(Seen(*(x.unflatten(-1, (-1, WARP)) for x in seen)))
    # lane 0 of each warp writes its pair to shared memory; one warp merges those
    whole = shuffle(Seen(*(x[..., 0] for x in each)))
    return Seen(*(x[..., :1] for x in whole))


@paper(on=online, year=2025, url="https://maharshi.bearblog.dev/optimizing-softmax-cuda/")
def softmax(scores: Tensor, *, threads: int = 256, reduction: Callable[[Seen], Seen] = in_warps) -> Tensor:
    """Softmax over the last axis by a block of threads a row. Any shape; a row that is -inf throughout gives zeros.

    `reduction` merges the threads' pairs: `halve` or `in_warps`. Raises UserError unless threads is a power of two from
    32 to 1024.
    """
    if threads not in (32, 64, 128, 256, 512, 1024):
        raise UserError(f"threads must be a power of two from 32 to 1024, not {threads}: choose 32, 64, ... or 1024")
    pieces = share_out(scores, threads)
    # each thread merges its own loads first, then the threads' pairs are reduced
    seen = reduction(reduce(merge, map(look, pieces.split(VECTOR, -1))))
    return relative(scores, seen.max) / seen.sum.masked_fill(seen.sum == 0, 1.0)


def share_out(scores: Tensor, threads: int) -> Tensor:
    """Assigns scores to threads in loads of four neighbours, one load a thread in turn. (..., S) -> (..., threads, n).

    Indices past the end hold -inf.
    """
    length = scores.shape[-1]
    # rounded up to whole loads of all threads
    whole = -(-length // (threads * VECTOR)) * threads * VECTOR
    padded = torch.nn.functional.pad(scores, (0, whole - length), value=-torch.inf)
    # (..., n, threads, 4) -> (..., threads, 4 n)
    return padded.unflatten(-1, (-1, threads, VECTOR)).transpose(-3, -2).flatten(-2)


def halve(seen: Seen) -> Seen:
    """Shared-memory reduction: the lower half of the threads merges the upper half's pairs, until one is left.

    Two (..., threads) -> two (..., 1).
    """
    while (half := seen.max.shape[-1] // 2) > 0:
        seen = merge(Seen(*(x[..., :half] for x in seen)), Seen(*(x[..., half:] for x in seen)))
    return seen
