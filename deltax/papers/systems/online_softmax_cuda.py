"""Learning CUDA by optimizing softmax: A worklog. Pandya, 2025. https://maharshi.bearblog.dev/optimizing-softmax-cuda/

An online softmax, but one row is shared out to the threads of a block, whose pairs merge by shuffles.

Safe softmax reads a row three times. Keeping maximum and sum together saves one read; the rest of the way is about how
threads that have each seen a part of the row put their pairs together: through shared memory in halves, or inside a
warp by exchanging registers, with one pair a warp left for shared memory. Four numbers are loaded at a time. Any of
these orders is right because the merge is associative and commutative. Here they are run in torch, a place of a tensor
for each thread; the kernel itself is `deltax.kernels.triton_softmax`.
"""

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from deltax import claim, paper
from deltax.errors import UserError
from deltax.papers.systems.online_softmax import Seen, log_sum, look, merge, relative
from deltax.papers.systems.online_softmax import softmax as online

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


@claim.parity(peer="torch.softmax")
def every_reduction_is_softmax():
    """By halves or by shuffles, with 32 to 1024 threads, at lengths that fill no load: softmax and its gradients."""
    torch.manual_seed(0)
    for length in (1, 7, 133, 1030):
        scores = (20 * torch.randn(3, length, dtype=torch.float64)).requires_grad_()
        weight, expected = torch.randn_like(scores), torch.softmax(scores, -1)
        (wanted,) = torch.autograd.grad((expected * weight).sum(), scores)
        for threads in (32, 128, 1024):
            for reduction in (halve, in_warps):
                ours = softmax(scores, threads=threads, reduction=reduction)
                (gradient,) = torch.autograd.grad((ours * weight).sum(), scores)
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
                torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-13)
    assert not softmax(torch.full((2, 9), -torch.inf), threads=32).any()


@claim
def five_shuffles_tell_every_thread():
    """After n exchanges each thread of a warp holds the merged pair of 2^n threads, after five that of all 32."""
    torch.manual_seed(0)
    apart = Seen(torch.zeros(32, 32, dtype=torch.float64), torch.eye(32, dtype=torch.float64))  # one row a thread's own
    held = apart
    for n, bit in enumerate((16, 8, 4, 2, 1), start=1):
        held = exchange(held, bit)
        assert torch.equal(held.sum.sum(0), torch.full((32,), 2.0**n, dtype=torch.float64))
    assert torch.equal(held.sum, torch.ones_like(held.sum)) and torch.equal(held.sum, shuffle(apart).sum)
    scores = 20 * torch.randn(3, 32, 5, dtype=torch.float64)
    expected = scores.flatten(-2).logsumexp(-1)[:, None].expand(-1, 32)
    torch.testing.assert_close(log_sum(shuffle(look(scores))), expected, rtol=1e-14, atol=0)


@claim
def each_score_is_one_threads():
    """However many threads, each score is read once, and what a warp loads at one time are neighbours in memory."""
    for length in (1, 133, 1030):
        places = torch.arange(length, dtype=torch.float64)
        for threads in (32, 256):
            pieces = share_out(places, threads)
            read = pieces[pieces.isfinite()]
            assert torch.equal(read.sort().values, places)
            first = pieces[:WARP, :VECTOR].flatten()
            assert torch.equal(first[first.isfinite()], places[: WARP * VECTOR])


@claim.measured(paper="each kernel of the sequence is faster than the one before (the post's table of bandwidths)")
def one_read_less_is_faster(lab):
    """On a row of 16 million scores, larger than the cache, softmax in two reads is faster than in three."""
    scores = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(scores)
    pieces = list(zip(scores.split(2**15), out.split(2**15)))

    def divide(largest: Tensor, total: Tensor) -> None:
        for piece, place in pieces:
            torch.sub(piece, largest, out=place).exp_().div_(total)

    def two() -> None:
        divide(*reduce(merge, (look(piece) for piece, _ in pieces)))

    def three() -> None:
        largest = reduce(torch.maximum, (piece.amax(-1) for piece, _ in pieces))
        divide(largest, sum(relative(piece, largest).sum() for piece, _ in pieces))

    found = [lab.ratio(two, three, repeats=5).value for _ in range(5)]
    return lab.at_least([math.log2(r) for r in found], 0.0, unit="doublings of speed", numbers={"times as fast": found})
