"""Trees whose values are borrowed: what does not fit is named, and a table is read where its bits say."""

import numpy as np
import pytest

from deltax import UserError
from deltax.papers.systems.performance.tree_evaluation import Node, Registers, extension, tree_evaluation

AND = ((0,), (0,), (0,), (1,))
LESS = ((0,), (1,), (0,), (0,))


def test_left_is_the_first_bit():
    assert tree_evaluation(Node(LESS, (0,), (1,))) == (1,)
    assert tree_evaluation(Node(LESS, (1,), (0,))) == (0,)
    assert tree_evaluation(Node(AND, Node(LESS, (0,), (1,)), (1,))) == (1,)


def test_the_extension_is_the_table_at_bits_and_linear_between():
    table = tuple((a, b) for a in (0, 1) for b in (0, 1)) * 4
    for row, value in enumerate(table):
        point = np.array([int(bit) for bit in f"{row:04b}"])
        assert tuple(extension(table, point, 7)) == value
    zero, one, two = (extension(table, np.array([1, y, 0, 1]), 7) for y in (0, 1, 2))
    assert ((two - 2 * one + zero) % 7 == 0).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tree_evaluation((0, 2)), "a leaf must be a tuple"),
        (lambda: tree_evaluation(Node(AND, (0,), (0, 1))), "with leaves of 1 bits every value has 1"),
        (lambda: tree_evaluation(Node(AND[:3], (0,), (1,))), "every table 4 rows"),
        (lambda: tree_evaluation(Node(((3,),) * 4, (0,), (1,))), "row must hold bits"),
        (lambda: Registers(2, 5), "need a prime above 5, for more than 4 roots; 5"),
        (lambda: Registers(2, 9), "9 is none"),
    ],
)
def test_what_does_not_fit_is_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
