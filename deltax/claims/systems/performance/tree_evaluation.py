"""Claims of tree-evaluation: the paper's equations, parity with peers, and what it measures."""

from itertools import product
from math import prod
from random import Random

import numpy as np

from deltax import claim
from deltax.papers.systems.performance.tree_evaluation import Bits, Node, Registers, _root_of, tree_evaluation


@claim
def it_computes_the_root_and_restores_the_rest():
    """For trees of height 0 to 3 and random register contents, the root equals a stack's and the other groups are
    restored. Calls over 7 elements are 1, 25, 601 and 14425.
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
    """For degree below m, the sum of F(w^j tau + x) over the m powers of w equals m F(x); at degree m it does not."""
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
    """For three widths, each level adds one loop counter's bits, where a stack adds a value's; the registers stay 3 b
    elements.
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


class Stack:
    """Evaluation with a stack; `most` is the most bits of values kept at a time."""

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
