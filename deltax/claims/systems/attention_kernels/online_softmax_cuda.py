"""Claims of online-softmax-cuda: the paper's equations, parity with peers, and what it measures."""

import math
from functools import reduce

import torch
from torch import Tensor

from deltax import claim
from deltax.papers.systems.attention_kernels.online_softmax import Seen, log_sum, look, merge, relative
from deltax.papers.systems.attention_kernels.online_softmax_cuda import (
    VECTOR,
    WARP,
    exchange,
    halve,
    in_warps,
    share_out,
    shuffle,
    softmax,
)


@claim.parity(peer="torch.softmax")
def every_reduction_is_softmax():
    """With `halve` and `in_warps`, 32 to 1024 threads and rows of 1 to 1030, softmax equals torch's to 1e-14 in
    float64. Gradients agree to 1e-13.
    """
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
    """After n exchanges each thread of a warp holds the merged pair of 2^n threads; after five, that of all 32."""
    torch.manual_seed(0)
    apart = Seen(torch.zeros(32, 32, dtype=torch.float64), torch.eye(32, dtype=torch.float64))  # row i: thread i alone
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
    """With 32 or 256 threads, each score is read by exactly one thread, and one load of a warp reads 128 neighbours."""
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
    """On one row of 16 million scores, two-read softmax is faster than three-read softmax."""
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
