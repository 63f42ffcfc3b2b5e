"""Claims of roofline: the paper's equations, parity with peers, and what it measures."""

import time
from collections.abc import Callable

import torch

from deltax import claim
from deltax.papers.systems.performance.roofline import MACHINES, Machine, Work, product, roofline


@claim
def time_is_the_longer_of_two():
    """On four machines, time by the roofline is the longer of arithmetic and memory time, and both are equal at the
    ridge.
    """
    for machine in MACHINES.values():
        for intensity in (0.25, 7.0, machine.ridge, 3e4):
            work = Work(1e12, 1e12 / intensity)
            longer = max(work.flops / machine.peak, work.bytes / machine.bandwidth)
            assert abs(work.flops / roofline(work, machine) / longer - 1) < 1e-12
        assert roofline(Work(machine.ridge, 1), machine) >= machine.peak * (1 - 1e-12)
        assert roofline(Work(machine.ridge * 0.99, 1), machine) < machine.peak
    ridges = [int(machine.ridge) for machine in MACHINES.values()]
    assert ridges == [200, 295, 229, 240]


@claim
def one_token_waits_for_memory():
    """In 16 bits, a product with n rows has at most n operations a byte: one row is memory-bound on four machines, an n
    x n product compute-bound from 3 ridges on.
    """
    for machine in MACHINES.values():
        for rows in (1, 8, 64):
            assert product(rows, 4096, 4096, 2).intensity < rows
        assert roofline(product(1, 4096, 4096, 2), machine) < machine.peak / 100
        side = int(3 * machine.ridge) + 1
        assert roofline(product(side, side, side, 2), machine) == machine.peak
        assert roofline(product(side - 9, side - 9, side - 9, 2), machine) < machine.peak


@claim.measured(paper="four kernels on four multicore machines lie under their roofs (section 6)")
def it_tells_a_kernels_rate(lab):
    """With this CPU's roofs measured by a large product and a copy, five other kernels reach the roofline's rate within
    a factor of two.
    """
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    square, long = draw(1024, 1024), draw(2**24)
    a, b, out = draw(768, 768), draw(4096, 4096), torch.empty(2**24)
    kernels: dict[str, tuple[Work, Callable[[], object]]] = {
        "scaling": (Work(2**24, 8 * 2**24), lambda: torch.mul(long, 1.5, out=out)),
        "adding": (Work(2**24, 12 * 2**24), lambda: torch.add(long, out, out=out)),
        "matrix by vector": (product(1, 4096, 4096, 4), lambda: b @ b[0]),
        "product of 768": (product(768, 768, 768, 4), lambda: a @ a),
        "tall product": (product(4096, 512, 512, 4), lambda: b[:, :512] @ square[:512, :512]),
    }
    factors: list[float] = []
    reached: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(5):
        machine = Machine(
            2 * 1024**3 / _seconds(lambda: square @ square), 8 * 2**24 / _seconds(lambda: out.copy_(long))
        )
        for name, (work, call) in kernels.items():
            reached[name].append(work.flops / _seconds(call) / roofline(work, machine))
        factors.append(max(max(r[-1], 1 / r[-1]) for r in reached.values()))
    figure, axes = plt.subplots(figsize=(5, 3.2))
    xs = [2.0 ** (i / 4) for i in range(-16, 40)]
    axes.loglog(xs, [roofline(Work(x, 1), machine) / 1e9 for x in xs], color="black")
    for name, (work, _) in kernels.items():
        axes.loglog(work.intensity, reached[name][-1] * roofline(work, machine) / 1e9, "o", label=name)
    axes.set(xlabel="operations a byte", ylabel="10^9 operations a second")
    axes.legend(frameon=False, fontsize="small")
    drawn = {"Attainable (line) and reached (dots), the last of five rounds": lab.figure(figure)}
    plt.close(figure)
    numbers = {"reached by attainable": reached, "machine": machine._asdict()}
    return lab.at_most(factors, 2.0, unit="times off, the worst kernel", numbers=numbers, figures=drawn)


def _seconds(call: Callable[[], object]) -> float:
    """The quickest of five runs after a warm-up."""
    call()
    found = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)
