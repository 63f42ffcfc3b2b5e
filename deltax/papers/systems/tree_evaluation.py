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
from itertools import product
from math import prod
from random import Random
from typing import NamedTuple

import numpy as np

from deltax import UserError, claim, paper

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


@claim
def it_computes_the_root_and_restores_the_rest():
    """From any contents of the registers the root's value is added to one group, and the others end as they began;
    a tree of height 0, 1, 2, 3 over 7 elements takes 1, 25, 601, 14425 calls.
    """
    random = Random(0)
    for height, calls in ((0, 1), (1, 25), (2, 601), (3, 14425)):
        tree = _random(random, height, b=2)
        contents = [[random.randrange(7) for _ in range(2)] for _ in range(3)]
        registers = Registers(2, 7, contents)
        assert tree_evaluation(tree, registers=registers) == Stack().value(tree)
        assert registers.groups[1:].tolist() == contents[1:]
        assert registers.calls == calls
    for b, height in ((1, 3), (3, 1)):
        tree = _random(random, height, b=b)
        assert tree_evaluation(tree) == Stack().value(tree)


@claim
def the_turns_cancel_all_but_the_value():
    """For a polynomial of degree below m, the sum of F(w^j tau + x) over the m powers of w is m F(x), for every tau; at
    degree m it is not.
    """
    random = np.random.default_rng(0)
    for prime in (5, 7, 13):
        turns, root = prime - 1, _root_of(prime)
        for degree in (0, 1, turns - 1, turns):
            powers = [e for e in product(range(degree + 1), repeat=2) if sum(e) <= degree]
            terms = list(zip(powers, random.integers(1, prime, len(powers)).tolist(), strict=True))
            x, tau = random.integers(0, prime, 2), random.integers(1, prime, 2)
            total = sum(_at(terms, pow(root, j, prime) * tau + x, prime) for j in range(turns))
            left = _at([(e, c) for e, c in terms if sum(e) == turns], tau, prime)
            assert (total - turns * (_at(terms, x, prime) + left)) % prime == 0
            assert degree == turns or left == 0
    assert sum(_at([((6,), 1)], pow(3, j) * np.array([1]) + 2, 7) for j in range(6)) % 7 != 6 * 2**6 % 7


@claim
def a_level_costs_a_counter_in_place_of_a_value():
    """With each level the bits kept grow by those of one loop counter, whatever the values' width, while a stack's grow
    by a value; the registers themselves stay 3 b elements.
    """
    random = Random(0)
    for b, prime, heights in ((1, 5, (1, 2, 3)), (2, 7, (1, 2)), (6, 17, (0, 1))):
        kept, stacked = [], []
        for height in heights:
            tree, registers, stack = _random(random, height, b=b), Registers(b, prime), Stack()
            assert tree_evaluation(tree, registers=registers) == stack.value(tree)
            kept.append(registers.bits)
            stacked.append(stack.most)
            assert registers.groups.shape == (3, b) and registers.deepest == height
        assert set(np.diff(kept).tolist()) == {(prime - 2).bit_length()}
        assert set(np.diff(stacked).tolist()) == {b}
    assert (17 - 2).bit_length() < 6


def _at(terms: list[tuple[tuple[int, ...], int]], point: np.ndarray, prime: int) -> int:
    """A polynomial, exponents with coefficients, at a point."""
    return sum(c * prod(pow(int(y), k, prime) for y, k in zip(point, e, strict=True)) for e, c in terms) % prime


def _random(random: Random, height: int, b: int) -> Node | Bits:
    def bits() -> Bits:
        return tuple(random.randrange(2) for _ in range(b))

    if not height:
        return bits()
    return Node(tuple(bits() for _ in range(4**b)), _random(random, height - 1, b), _random(random, height - 1, b))


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
