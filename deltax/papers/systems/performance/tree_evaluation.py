"""Tree Evaluation Is in Space O(log n log log n). Cook, Mertz, 2024. https://doi.org/10.1145/3618260.3649664

A recursion over a tree, but child values are added to registers already in use, then subtracted again.

A node adds its value to one group of registers and borrows the other two for its children. For each of m powers of a
root of unity w, it multiplies their contents by w, adds the children, adds 1/m of its function's polynomial there, and
subtracts the children. The sum over the powers is the polynomial at the children's values, for any contents, and the
contents are restored. A level costs a loop counter instead of a value, and each child is evaluated 2 m times.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltax import UserError, paper

Bits = tuple[int, ...]


class Node(NamedTuple):
    """A function of two children's b bits: row 2^b left + right of `table` has its b bits. A leaf is bits alone."""

    table: tuple[Bits, ...]
    left: "Node | Bits"
    right: "Node | Bits"


class Registers:
    """Three groups of b elements of the field of `prime` elements; no other value is stored.

    contents  their initial contents, 0 by default
    calls     evaluations of a node
    deepest   the most loop counters at a time
    """

    def __init__(self, b: int, prime: int, contents: Sequence[Sequence[int]] | None = None):
        _check_field(b, prime)
        self.prime, self.root = prime, _root_of(prime)
        self.groups = np.array([[0] * b] * 3 if contents is None else contents, np.int64) % prime
        self.calls = self.deepest = self._counters = 0

    @property
    def bits(self) -> int:
        """Bits of all registers, and of the most loop counters."""
        return self.groups.size * (self.prime - 1).bit_length() + self.deepest * (self.prime - 2).bit_length()

    def add(self, tree: Node | Bits, into: int, sign: int = 1) -> None:
        """Adds sign times the tree's value to group `into`; the other two groups are restored."""
        self.calls += 1
        if not isinstance(tree, Node):
            self.groups[into] = (self.groups[into] + sign * np.array(tree)) % self.prime
            return
        # the two groups to borrow
        left, right = (group for group in range(3) if group != into)
        turns = self.prime - 1
        self._counters += 1
        self.deepest = max(self.deepest, self._counters)
        # sum over j of F(w^j tau + x) = m F(x), for a degree below m
        for _ in range(turns):
            self.groups[[left, right]] = self.groups[[left, right]] * self.root % self.prime
            self.add(tree.left, left)
            self.add(tree.right, right)
            # the registers hold w^j tau + x: contents tau, children's values x
            value = extension(tree.table, np.concatenate([self.groups[left], self.groups[right]]), self.prime)
            self.groups[into] = (self.groups[into] + sign * pow(turns, -1, self.prime) * value) % self.prime
            # takes the children off again; after m turns w^m = 1 restores tau
            self.add(tree.left, left, -1)
            self.add(tree.right, right, -1)
        self._counters -= 1


@paper(year=2024, url="https://doi.org/10.1145/3618260.3649664")
def tree_evaluation(tree: Node | Bits, *, registers: Registers | None = None) -> Bits:
    """The bits of the root. Raises UserError for a tree whose tables or leaves have other sizes.

    registers  with any contents; by default 0, over the smallest field with more than 2 b roots of unity
    """
    b = _width(tree)
    registers = registers or Registers(b, next(p for p in range(2 * b + 2, 8 * b + 8) if _is_prime(p)))
    before = registers.groups[0].copy()
    registers.add(tree, 0)
    return tuple(((registers.groups[0] - before) % registers.prime).tolist())


def extension(table: Sequence[Bits], point: np.ndarray, prime: int) -> np.ndarray:
    """The multilinear polynomial, in 2 b variables, that equals the table at all 0-1 points. -> (b,)"""
    values = np.array(table, np.int64).reshape(*[2] * len(point), -1)
    for y in point:
        # one variable at a time: f(0) (1 - y) + f(1) y
        values = (values[0] * (1 - y) + values[1] * y) % prime
    return values


def _width(tree: Node | Bits) -> int:
    """The number of bits of every value."""
    if not isinstance(tree, Node):
        if not tree or set(tree) - {0, 1}:
            raise UserError(f"a leaf must be a tuple of at least one bit, not {tree}: use 0 and 1")
        return len(tree)
    b = _width(tree.left)
    if _width(tree.right) != b or {len(row) for row in tree.table} != {b} or len(tree.table) != 4**b:
        raise UserError(f"with leaves of {b} bits every value has {b}, and every table {4**b} rows of {b}")
    if any(set(row) - {0, 1} for row in tree.table):
        raise UserError(f"a table row must hold bits, and one of {tree.table} does not: use 0 and 1")
    return b


def _check_field(b: int, prime: int) -> None:
    if not _is_prime(prime) or prime - 1 <= 2 * b:
        raise UserError(
            f"values of {b} bits need a prime above {2 * b + 1}, for more than {2 * b} roots; {prime} is none"
        )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _root_of(prime: int) -> int:
    """The least generator of the multiplicative group modulo prime."""
    return next(w for w in range(1, prime) if len({pow(w, j, prime) for j in range(prime - 1)}) == prime - 1)
