"""Roofline: An Insightful Visual Performance Model for Multicore Architectures. Williams, Waterman, Patterson, 2009.
https://doi.org/10.1145/1498765.1498785

An operation count, but with bytes moved too: attainable speed is min(peak, bandwidth x intensity).

Intensity is operations by bytes to and from slow memory. On logarithmic axes the bound is a slanted line and a flat
one. They meet at the ridge, the least intensity at which the peak can be reached. The bound shows whether arithmetic or
memory limits a program.
"""

from typing import NamedTuple

from deltax import paper
from deltax.errors import UserError


class Machine(NamedTuple):
    """Peak operations a second, and peak bytes a second to and from slow memory."""

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """The least intensity, in operations a byte, at which the peak can be reached."""
        return self.peak / self.bandwidth


class Work(NamedTuple):
    """Operations, and bytes moved."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


@paper(on=None, url="https://doi.org/10.1145/1498765.1498785", year=2009)
def roofline(work: Work, machine: Machine) -> float:
    """Attainable operations a second: min(peak, bandwidth x intensity).

    Raises UserError unless operations and bytes are above 0.
    """
    if min(work) <= 0:
        raise UserError(f"operations and bytes must be above 0, not {work.flops:g} and {work.bytes:g}: count both")
    # compute-bound right of the ridge, memory-bound left of it
    return min(machine.peak, machine.bandwidth * work.intensity)


MACHINES = {  # dense 16-bit peak and memory bandwidth, by the vendors
    "A100": Machine(312e12, 1.555e12),
    "H100 SXM": Machine(989e12, 3.35e12),
    "TPU v4": Machine(275e12, 1.2e12),
    "TPU v5e": Machine(197e12, 0.82e12),
}


def product(m: int, k: int, n: int, size: int) -> Work:
    """The matrix product (m, k) x (k, n) of numbers of `size` bytes, each read or written once."""
    # 2 m n k operations: a multiplication and an addition each
    return Work(2 * m * n * k, size * (m * k + k * n + m * n))
