"""Claims of online-softmax: the paper's equations, parity with peers, and what it measures."""

from functools import reduce

import torch
from torch import Tensor

from deltax import claim
from deltax.claims.checking import faster
from deltax.papers.systems.attention_kernels.online_softmax import log_sum, look, merge, softmax, top_k


@claim
def any_order_and_any_grouping_will_do():
    """Over 20 random merge trees of 7 shuffled blocks, max is equal to the bit, sum to 1e-13 (Theorem 1; scales 1 to
    1e4).
    """
    torch.manual_seed(0)
    for scale in (1, 20, 1e4):
        blocks = [look(scale * torch.randn(3, n, dtype=torch.float64)) for n in (1, 7, 64, 2, 5, 1, 30)]
        in_order = reduce(merge, blocks)
        for _ in range(20):
            left = [blocks[i] for i in torch.randperm(len(blocks))]
            while len(left) > 1:
                i = int(torch.randint(len(left) - 1, ()))
                left[i : i + 2] = [merge(left[i], left[i + 1])]
            assert torch.equal(left[0].max, in_order.max)
            torch.testing.assert_close(left[0].sum, in_order.sum, rtol=1e-13, atol=0)


@claim
def having_seen_nothing_changes_nothing():
    """Merging with a fully masked block, (-inf, 0), changes no bit of the other pair and makes no NaN.
    Gradient and softmax of half-masked rows equal torch's to 1e-14.
    """
    torch.manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    masked = look(torch.full((3, 5), -torch.inf, dtype=torch.float64))
    assert masked.max.isneginf().all() and not masked.sum.any()
    seen = look(scores)
    for both in (merge(seen, masked), merge(masked, seen), merge(seen, merge(masked, masked))):
        assert torch.equal(both.max, seen.max) and torch.equal(both.sum, seen.sum)
    (gradient,) = torch.autograd.grad(log_sum(merge(masked, merge(seen, masked))).sum(), scores)
    torch.testing.assert_close(gradient, torch.softmax(scores, -1), rtol=1e-14, atol=1e-14)
    half = torch.cat([scores.detach(), torch.full((3, 9), -torch.inf)], -1)
    torch.testing.assert_close(softmax(half, block=4)[:, :7], torch.softmax(scores, -1), rtol=1e-14, atol=1e-14)
    assert not softmax(half[:, 7:], block=4).any()


@claim
def a_score_is_read_once_less():
    """On (3, 133) scores, online softmax reads each score twice and writes it once; three-pass softmax reads it three
    times.
    """
    torch.manual_seed(0)
    scores = torch.randn(3, 133, dtype=torch.float64)
    online, safe = scores.as_subclass(_Counted), scores.as_subclass(_Counted)
    out = softmax(online, block=7)
    torch.testing.assert_close(out, _three_passes(safe, block=7), rtol=1e-13, atol=1e-15)
    assert (online.read, safe.read, out.numel()) == (2 * scores.numel(), 3 * scores.numel(), scores.numel())


@claim
def the_best_are_found_in_one_read():
    """For k = 1, 5, 12 and blocks of 1, 7, 64, top_k reads each score once.
    Indices equal those of torch's softmax and topk, values to 1e-13.
    """
    torch.manual_seed(0)
    scores = 20 * torch.randn(3, 133, dtype=torch.float64)
    for k in (1, 5, 12):
        values, places = torch.softmax(scores, -1).topk(k)
        for block in (1, 7, 64):
            counted = scores.as_subclass(_Counted)
            ours, where = top_k(counted, k, block=block)
            torch.testing.assert_close(ours, values, rtol=1e-13, atol=1e-15)
            assert torch.equal(where, places) and counted.read == scores.numel()


@claim.parity(peer="torch.softmax, torch.logsumexp")
def equals_torch():
    """Softmax and its gradients equal torch's at scales 20 and 10,000, in blocks of 1, 7 and 64, to 1e-14 in
    float64.
    """
    torch.manual_seed(0)
    for dtype, near in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for scale in (20, 1e4):
            scores = (scale * torch.randn(3, 133, dtype=dtype)).requires_grad_()
            weight = torch.randn_like(scores)
            theirs, total = torch.softmax(scores, -1), torch.logsumexp(scores, -1)
            expected = torch.autograd.grad((theirs * weight).sum(), scores)[0]
            for block in (1, 7, 64):
                ours = softmax(scores, block=block)
                gradient = torch.autograd.grad((ours * weight).sum(), scores)[0]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=near)
                torch.testing.assert_close(gradient, expected, rtol=0, atol=4 * near)
                seen = reduce(merge, map(look, scores.split(block, -1)))
                torch.testing.assert_close(log_sum(seen), total, rtol=4 * near, atol=0)


class _Counted(Tensor):
    """Scores in slow memory. Counts the elements that are handed out block by block."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # slices are plain tensors
    read = 0

    def __getitem__(self, place: object) -> Tensor:
        piece = super().__getitem__(place)
        self.read += piece.numel()
        return piece

    def split(self, size: int, axis: int):
        for piece in super().split(size, axis):
            self.read += piece.numel()
            yield piece


def _three_passes(scores: Tensor, block: int) -> Tensor:
    """Algorithm 2, safe softmax: one pass each for the maximum, the sum and the quotient."""
    largest = reduce(torch.maximum, (piece.amax(-1) for piece in scores.split(block, -1)))[:, None]
    total = sum(torch.exp(piece - largest).sum(-1) for piece in scores.split(block, -1))[:, None]
    return torch.cat([torch.exp(piece - largest) / total for piece in scores.split(block, -1)], -1)


@claim.measured(paper="softmax and top-k fused, up to 5 times as fast on a V100 (abstract)")
def the_largest_come_sooner_in_one_read(lab):
    """On 64 rows of 100,000 scores, fused softmax and top-5 is faster than torch.softmax followed by topk."""
    torch.manual_seed(0)
    scores = torch.randn(64, 100_000)
    found = lab.ratio(lambda: top_k(scores, 5, block=4096), lambda: torch.softmax(scores, -1).topk(5, -1))
    return lab.verdict(faster(found, 1.0), estimate=found.value, interval=found, unit="times as fast")
