"""Claims of kernel-fusion: the paper's equations, parity with peers, and what it measures."""

import math
from collections.abc import Sequence

import torch

from deltax import claim
from deltax.papers.systems.performance.kernel_fusion import (
    Operator,
    _chain,
    fuse,
    fused,
    moved,
)
from deltax.papers.systems.performance.roofline import Machine, Work, roofline


@claim
def a_chain_moves_its_ends_alone():
    """For k = 2 and 8 elementwise operators on n numbers, fusing moves 2 n instead of 2 k n; tensors read elsewhere are
    still written.
    """
    for k in (2, 8):
        chain = [Operator(f"op{i}", (f"x{i}",), (f"x{i + 1}",), 7) for i in range(k)]
        sizes = {f"x{i}": 7 for i in range(k + 1)}
        (one,) = fuse(chain, "op0", f"op{k - 1}")
        assert moved(chain, sizes) == 2 * k * 7 and moved([one], sizes) == 2 * 7 and one.flops == 7 * k
        listened = [*chain, Operator("other", ("x1",), ("y",), 0)]
        assert fuse(listened, "op0", f"op{k - 1}")[0].writes == ("x1", f"x{k}")


@claim
def as_one_they_climb_the_roof():
    """By the roofline, k fused elementwise operators take 1/k of their time while memory-bound, and their arithmetic's
    time beyond.
    """
    machine, count, size = Machine(peak=1e11, bandwidth=1e10), 10**6, 4  # its ridge is at 80 operations a number
    seconds = lambda work: work.flops / roofline(work, machine)
    for k in (2, 8, 79, 200):
        apart, one = k * seconds(Work(count, 2 * size * count)), seconds(Work(k * count, 2 * size * count))
        least = k * count / machine.peak
        assert abs(one / max(apart / k, least) - 1) < 1e-12, k
        assert (one > apart / k * (1 + 1e-9)) == (k > 80)


@claim
def little_arithmetic_moves_most_numbers():
    """In BERT large's encoder layer, forward, products do over 99.5 % of the FLOPs and move under 30 % of the data. The
    paper's four fused groups save 40 %.
    """
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
    """For blocks of 1 to 1000, output and gradient of a fused chain of four equal the unfused chain's to 1e-13."""
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
    """With prefetch, n equal tiles take load + (n - 1) max(load, compute) + compute, never under half the sequential
    time.
    """
    torch.manual_seed(0)
    for load, compute in ((3.0, 3.0), (1.0, 5.0), (4.0, 0.5)):
        assert prefetched([load] * 9, [compute] * 9) == load + 8 * max(load, compute) + compute
    for _ in range(100):
        loads, computes = torch.rand(2, 7, dtype=torch.float64).tolist()
        apart, ahead = sum(loads) + sum(computes), prefetched(loads, computes)
        assert max(apart / 2, sum(loads), sum(computes)) <= ahead + 1e-12 <= apart + 2e-12


@claim.measured(paper="fused, a BERT encoder layer trains 1.30 times as fast as in PyTorch (abstract)")
def a_fused_chain_is_faster(lab):
    """On ten million numbers, eight elementwise operators compiled into one kernel are at least 4 times as fast as
    separate ones.
    """
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    chain = [torch.neg, torch.abs, torch.relu, torch.square] * 2
    apart, blocks = _chain(chain), fused(*chain)
    compiled = torch.compile(apart)
    with torch.no_grad():
        found = [lab.ratio(lambda: compiled(x), lambda: apart(x), repeats=5).value for _ in range(5)]
        in_blocks = [lab.ratio(lambda: blocks(x), lambda: apart(x), repeats=5).value for _ in range(5)]
    numbers = {"times as fast, compiled": found, "times as fast, in blocks": in_blocks}
    return lab.at_least([math.log2(r) for r in found], 2.0, unit="doublings of speed", numbers=numbers)


def encoder_layer(b: int = 8, t: int = 512, h: int = 16, k: int = 64) -> tuple[list[Operator], dict[str, int]]:
    """BERT's encoder layer forward with dropout, operator by operator, and its tensors' sizes (Figure 2).

    The default sizes are the paper's, those of BERT large.
    """
    d, f = h * k, 4 * h * k
    x, wide, square = b * t * d, b * t * f, b * h * t * t
    sizes = {"Wqkv": 3 * d * d, "Wout": d * d, "W1": d * f, "W2": d * f}
    operators = []

    def add(name: str, reads: str, writes: str, size: int, flops: int) -> None:
        sizes.update(dict.fromkeys(writes.split(), size))
        operators.append(Operator(name, tuple(reads.split()), tuple(writes.split()), flops))

    sizes["x"] = x
    add("qkv product", "x Wqkv", "qkv", 3 * x, 6 * x * d)
    add("input bias", "qkv", "q k v", x, 3 * x)
    add("scores", "q k", "scores", square, 2 * square * k)
    add("scale", "scores", "scaled", square, square)
    add("softmax", "scaled", "weights", square, 5 * square)
    add("weight dropout", "weights", "dropped wmask", square, 2 * square)
    add("mean of values", "dropped v", "heads", x, 2 * square * k)
    add("out product", "heads Wout", "out", x, 2 * x * d)
    for i, given in ((1, "x"), (2, "normed1")):
        if i == 2:
            add("up product", "normed1 W1", "up", wide, 2 * x * f)
            add("up bias", "up", "biased", wide, wide)
            add("relu", "biased", "active", wide, wide)
            add("up dropout", "active", "hidden umask", wide, 2 * wide)
            add("down product", "hidden W2", "out2", x, 2 * x * f)
        add(f"bias {i}", "out" if i == 1 else "out2", f"biased{i}", x, x)
        add(f"dropout {i}", f"biased{i}", f"dropped{i} mask{i}", x, 2 * x)
        add(f"residual {i}", f"dropped{i} {given}", f"sum{i}", x, x)
        add(f"norm {i}", f"sum{i}", f"normed{i}", x, 7 * x)
    return operators, sizes


def prefetched(loads: Sequence[float], computes: Sequence[float]) -> float:
    """Time of tiles, each loaded while the one before is computed, synchronised at every tile."""
    together = (max(load, compute) for load, compute in zip(loads[1:], computes[:-1], strict=True))
    return loads[0] + sum(together) + computes[-1]
