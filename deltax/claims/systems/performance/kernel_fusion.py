"""Claims of kernel-fusion: the paper's equations, parity with peers, and what it measures."""

import math

import torch

from deltax import claim
from deltax.papers.systems.performance.kernel_fusion import (
    Operator,
    _chain,
    encoder_layer,
    fuse,
    fused,
    moved,
    prefetched,
)
from deltax.papers.systems.performance.roofline import Machine, Work, roofline


@claim
def a_chain_moves_its_ends_alone():
    """Of n numbers, k elementwise operators move 2 k n apart and 2 n as one; what others read is still written."""
    for k in (2, 8):
        chain = [Operator(f"op{i}", (f"x{i}",), (f"x{i + 1}",), 7) for i in range(k)]
        sizes = {f"x{i}": 7 for i in range(k + 1)}
        (one,) = fuse(chain, "op0", f"op{k - 1}")
        assert moved(chain, sizes) == 2 * k * 7 and moved([one], sizes) == 2 * 7 and one.flops == 7 * k
        listened = [*chain, Operator("other", ("x1",), ("y",), 0)]
        assert fuse(listened, "op0", f"op{k - 1}")[0].writes == ("x1", f"x{k}")


@claim
def as_one_they_climb_the_roof():
    """By the roofline, k elementwise operators as one take a k-th of their time apart while they wait for memory still,
    and the time of their arithmetic once they do not."""
    machine, count, size = Machine(peak=1e11, bandwidth=1e10), 10**6, 4  # its ridge is at 80 operations a number
    seconds = lambda work: work.flops / roofline(work, machine)
    for k in (2, 8, 79, 200):
        apart, one = k * seconds(Work(count, 2 * size * count)), seconds(Work(k * count, 2 * size * count))
        least = k * count / machine.peak
        assert abs(one / max(apart / k, least) - 1) < 1e-12, k
        assert (one > apart / k * (1 + 1e-9)) == (k > 80)


@claim
def little_arithmetic_moves_most_numbers():
    """In BERT large's encoder layer, forward, matrix products do over 99.5 % of the arithmetic and move under 30 % of
    the numbers; the paper's four groups, each run as one, leave 40 % of all that is moved unmoved."""
    operators, sizes = encoder_layer()
    products = [op for op in operators if "product" in op.name or op.name in ("scores", "mean of values")]
    assert sum(op.flops for op in products) > 0.995 * sum(op.flops for op in operators)
    assert moved(products, sizes) < 0.3 * moved(operators, sizes)
    groups = ("scale", "weight dropout"), ("bias 1", "norm 1"), ("up bias", "up dropout"), ("bias 2", "norm 2")
    left = operators
    for first, last in groups:
        left = fuse(left, first, last)
    assert sum(op.flops for op in left) == sum(op.flops for op in operators)
    assert 0.39 < 1 - moved(left, sizes) / moved(operators, sizes) < 0.41


@claim
def fused_is_the_chain():
    """Run block by block, a chain of elementwise operators gives the same, to the bit, and the same gradients."""
    torch.manual_seed(0)
    x = torch.randn(3, 61, dtype=torch.float64, requires_grad=True)
    weight, chain = torch.randn_like(x), (torch.sin, lambda y: y * 3 - 1, torch.tanh, torch.exp)
    expected = _chain(chain)(x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    for block in (1, 7, 64, 1000):
        ours = fused(*chain, block=block)(x)
        (gradient,) = torch.autograd.grad((ours * weight).sum(), x)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=1e-15)


@claim
def fetching_ahead_halves_at_most():
    """Fetched ahead, n tiles alike take load + (n - 1) max(load, compute) + compute; never under half of the sum, never
    more than it, and never under all the loads or all the computing."""
    torch.manual_seed(0)
    for load, compute in ((3.0, 3.0), (1.0, 5.0), (4.0, 0.5)):
        assert prefetched([load] * 9, [compute] * 9) == load + 8 * max(load, compute) + compute
    for _ in range(100):
        loads, computes = torch.rand(2, 7, dtype=torch.float64).tolist()
        apart, ahead = sum(loads) + sum(computes), prefetched(loads, computes)
        assert max(apart / 2, sum(loads), sum(computes)) <= ahead + 1e-12 <= apart + 2e-12


@claim.measured(paper="fused, a BERT encoder layer trains 1.30 times as fast as in PyTorch (abstract)")
def a_fused_chain_is_faster(lab):
    """On ten million numbers, more than the cache holds, eight elementwise operators compiled into one are at least
    four times as fast as one after the other."""
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    chain = [torch.neg, torch.abs, torch.relu, torch.square] * 2
    apart, blocks = _chain(chain), fused(*chain)
    compiled = torch.compile(apart)
    with torch.no_grad():
        found = [lab.ratio(lambda: compiled(x), lambda: apart(x), repeats=5).value for _ in range(5)]
        in_blocks = [lab.ratio(lambda: blocks(x), lambda: apart(x), repeats=5).value for _ in range(5)]
    numbers = {"times as fast, compiled": found, "times as fast, in blocks": in_blocks}
    return lab.at_least([math.log2(r) for r in found], 2.0, unit="doublings of speed", numbers=numbers)
