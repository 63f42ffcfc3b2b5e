"""Roofline: An Insightful Visual Performance Model for Multicore Architectures. Williams, Waterman, Patterson, 2009.
https://doi.org/10.1145/1498765.1498785

A count of operations, but of bytes moved too: a program is as fast as the slower of arithmetic and memory lets it be.

Attainable operations a second are min(peak, bandwidth x intensity), intensity being operations by bytes that go to and
from slow memory. On logarithmic axes that is a slanted roof and a flat one; the ridge where they meet is the intensity
from which a machine can be kept busy. It is a bound, and says which of two things to work on.
"""

from typing import NamedTuple

from deltax import paper
from deltax.errors import UserError


class Machine(NamedTuple):
    """Operations a second at best, and bytes a second to and from slow memory at best."""

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """The least intensity, in operations a byte, at which the peak can be reached."""
        return self.peak / self.bandwidth


class Work(NamedTuple):
    """Operations, and bytes that must be moved."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


MACHINES = {  # 16-bit products, as the vendors state them
    "A100": Machine(312e12, 1.555e12),
    "H100 SXM": Machine(989e12, 3.35e12),
    "TPU v4": Machine(275e12, 1.2e12),
    "TPU v5e": Machine(197e12, 0.82e12),
}


def product(m: int, k: int, n: int, size: int) -> Work:
    """A matrix product (m, k) x (k, n) of numbers of `size` bytes, each read or written once."""
    return Work(2 * m * n * k, size * (m * k + k * n + m * n))


@paper(on=None, url="https://doi.org/10.1145/1498765.1498785", year=2009)
def roofline(work: Work, machine: Machine) -> float:
    """Operations a second that are attainable: min(peak, bandwidth x intensity).

    Raises UserError unless operations and bytes are above 0.
    """
    if min(work) <= 0:
        raise UserError(f"work has operations and bytes above 0, not {work.flops:g} and {work.bytes:g}")
    return min(machine.peak, machine.bandwidth * work.intensity)
