"""The genealogy's places."""

import time
from types import SimpleNamespace

import fakes
import pytest

from deltax import catalog
from deltax.site.layout import COLUMNS, ancestors, place


def node(key, year, field="a", on=()):
    return SimpleNamespace(key=key, year=year, field=field, on=tuple(on))


def laid(*nodes):
    return place({n.key: n for n in nodes})


def test_no_paper_no_layout():
    assert place({}).at == {}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return fakes.catalogue(tmp_path_factory.mktemp("papers"), 400)


@pytest.mark.parametrize("which", ["real", "many"])
def test_papers_stand_in_their_year_and_lane_and_none_on_another(which, many):
    papers = many if which == "many" else catalog.papers()
    found = place(papers)
    years = {year: (x, x + width) for year, x, width in found.years}
    lanes = {field: (y, y + rows) for field, y, rows in found.lanes}
    for key, (x, y) in found.at.items():
        assert years[papers[key].year][0] < x < years[papers[key].year][1]
        assert lanes[papers[key].field][0] < y < lanes[papers[key].field][1]
    assert len(set(found.at.values())) == len(papers)
    assert all(a[1] + a[2] <= b[1] + 1e-9 for a, b in zip(found.years, found.years[1:]))
    assert all(a[1] + a[2] <= b[1] for a, b in zip(found.lanes, found.lanes[1:]))


def test_a_parent_of_the_same_year_stands_to_the_left():
    """When the lane has a column for each; nodes of one depth share a column."""
    found = laid(node("c", 2020, on=["b"]), node("b", 2020, on=["z"]), node("z", 2020))
    assert found.at["z"][0] < found.at["b"][0] < found.at["c"][0]


def test_a_chain_stays_in_its_row():
    nodes = [node("a", 2000), node("b", 2000), *(node(f"n{i}", 2001, on=["a"]) for i in range(COLUMNS * 3))]
    found = laid(*nodes, node("last", 2002, on=["n3"]))
    assert found.at["last"][1] == found.at["n3"][1]


def test_no_paper_stands_on_the_way_to_another():
    """A parent with a child each year: the steps do not lie on one line."""
    found = laid(node("a", 2000), *(node(f"n{y}", y, on=["a"]) for y in range(2001, 2004)))
    assert len({found.at[f"n{y}"][1] for y in range(2001, 2004)}) >= 2


def test_a_long_gap_is_narrow():
    found = laid(*(node(f"n{y}", y) for y in (1950, *range(2000, 2012))))
    gap = sum(width for year, _, width in found.years if 1950 < year < 2000)
    assert gap <= found.years[-1][2]


def test_lanes_that_have_much_to_do_with_one_another_are_neighbours():
    nodes = [node(f"{f}0", 2000, f) for f in "abcd"] + [node(f"d{i}", 2001, "d", ["a0"]) for i in range(5)]
    order = [field for field, _, _ in laid(*nodes).lanes]
    assert abs(order.index("a") - order.index("d")) == 1


def test_a_circle_and_an_absent_parent_do_no_harm():
    found = laid(node("a", 2000, on=["b", "gone"]), node("b", 2000, on=["a"]))
    assert len(found.at) == 2
    assert ancestors("a", {"a": ["b"], "b": ["a"]}) == ["b"]


def test_ancestors_are_all_of_them_nearest_first():
    parents = {"d": ["c"], "c": ["b", "a"], "b": ["a"]}
    assert ancestors("d", parents) == ["c", "b", "a"]


def test_four_hundred_papers_are_placed_within_a_quarter_second(many):
    began = time.perf_counter()
    place(many)
    assert time.perf_counter() - began < 0.25
