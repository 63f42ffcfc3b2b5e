"""Tree Evaluation Is in Space O(log n log log n). Cook, Mertz, 2024. https://doi.org/10.1145/3618260.3649664

A recursion over a tree, but no level keeps its children's values: they are added into registers that are in use, and
subtracted again.

A node adds its value to a group of registers whatever they hold, and borrows the two other groups for its children:
over all m powers of a root of unity it turns what they hold, adds the children, adds 1/m of its function's polynomial
there, and takes the children away again. The sum over the powers is the polynomial at the children's values alone, for
any contents; and after m turns the contents are what they were. So a level costs a loop counter where a stack costs a
value, and pays in time: each child is asked 2 m times in place of once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltax import UserError, paper

Bits = tuple[int, ...]


class Node(NamedTuple):
    """A function of two children's bits: row 2^b left + right of `table` has its b bits. A leaf is bits alone."""

    table: tuple[Bits, ...]
    left: "Node | Bits"
    right: "Node | Bits"


class Registers:
    """Three groups of b elements of the field of `prime` elements: all the values that there are.

    contents  what they hold to begin with, 0 unless it is given
    calls     how often a node was asked to add its value
    deepest   the most loop counters that were kept at a time
    """

    def __init__(self, b: int, prime: int, contents: Sequence[Sequence[int]] | None = None):
        _check_field(b, prime)
        self.prime, self.root = prime, _root_of(prime)
        self.groups = np.array([[0] * b] * 3 if contents is None else contents, np.int64) % prime
        self.calls = self.deepest = self._counters = 0

    @property
    def bits(self) -> int:
        """Of all registers, and of the loop counters at their most."""
        return self.groups.size * (self.prime - 1).bit_length() + self.deepest * (self.prime - 2).bit_length()

    def add(self, tree: Node | Bits, into: int, sign: int = 1) -> None:
        """Add sign times the tree's value to a group; the other two end as they began."""
        self.calls += 1
        if not isinstance(tree, Node):
            self.groups[into] = (self.groups[into] + sign * np.array(tree)) % self.prime
            return
        left, right = (group for group in range(3) if group != into)
        turns = self.prime - 1
        self._counters += 1
        self.deepest = max(self.deepest, self._counters)
        for _ in range(turns):
            self.groups[[left, right]] = self.groups[[left, right]] * self.root % self.prime
            self.add(tree.left, left)
            self.add(tree.right, right)
            value = extension(tree.table, np.concatenate([self.groups[left], self.groups[right]]), self.prime)
            self.groups[into] = (self.groups[into] + sign * pow(turns, -1, self.prime) * value) % self.prime
            self.add(tree.left, left, -1)
            self.add(tree.right, right, -1)
        self._counters -= 1


def extension(table: Sequence[Bits], point: np.ndarray, prime: int) -> np.ndarray:
    """The polynomial, of degree 1 in each of 2 b variables, that is the table where all of them are 0 or 1. -> (b,)"""
    values = np.array(table, np.int64).reshape(*[2] * len(point), -1)
    for y in point:
        values = (values[0] * (1 - y) + values[1] * y) % prime
    return values


@paper(year=2024, url="https://doi.org/10.1145/3618260.3649664")
def tree_evaluation(tree: Node | Bits, *, registers: Registers | None = None) -> Bits:
    """The bits of the root. Raises UserError for a tree whose tables or leaves do not fit each other.

    registers  may hold anything; by default all 0, over the smallest field with more than 2 b roots of unity
    """
    b = _width(tree)
    registers = registers or Registers(b, next(p for p in range(2 * b + 2, 8 * b + 8) if _is_prime(p)))
    before = registers.groups[0].copy()
    registers.add(tree, 0)
    return tuple(((registers.groups[0] - before) % registers.prime).tolist())


class Stack:
    """The same with a stack; `most` is how many bits of values were kept at a time."""

    def __init__(self) -> None:
        self.kept = self.most = 0

    def value(self, tree: Node | Bits) -> Bits:
        if isinstance(tree, Node):
            left, right = self.value(tree.left), self.value(tree.right)
            self.kept -= len(left) + len(right)
            tree = tree.table[int("".join(map(str, left + right)), 2)]
        self.kept += len(tree)
        self.most = max(self.most, self.kept)
        return tree


def _width(tree: Node | Bits) -> int:
    """How many bits every value of the tree has."""
    if not isinstance(tree, Node):
        if not tree or set(tree) - {0, 1}:
            raise UserError(f"a leaf holds bits, 0 or 1, at least one; not {tree}")
        return len(tree)
    b = _width(tree.left)
    if _width(tree.right) != b or {len(row) for row in tree.table} != {b} or len(tree.table) != 4**b:
        raise UserError(f"with leaves of {b} bits every value has {b}, and every table {4**b} rows of {b}")
    if any(set(row) - {0, 1} for row in tree.table):
        raise UserError("a table's rows are bits, 0 or 1")
    return b


def _check_field(b: int, prime: int) -> None:
    if not _is_prime(prime) or prime - 1 <= 2 * b:
        raise UserError(
            f"values of {b} bits need a prime above {2 * b + 1}, for more than {2 * b} roots; {prime} is none"
        )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _root_of(prime: int) -> int:
    """The least number whose powers are all prime - 1 that are not 0."""
    return next(w for w in range(1, prime) if len({pow(w, j, prime) for j in range(prime - 1)}) == prime - 1)
