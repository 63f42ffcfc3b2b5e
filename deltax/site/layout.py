"""Where the papers of the genealogy stand: years along x, a lane for each field."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

COLUMNS = 4
"""Papers of one year that a lane puts side by side before it opens another row."""

_EMPTY, _GAP, _SPARSE = 0.15, 0.6, 0.6
"""Widths: of a year without papers, at most of a run of such years, and of a year of one or two."""


class Node(Protocol):
    """What a paper must have to be placed; `on` may name papers that are not there."""

    key: str
    year: int
    field: str
    on: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Places in units of one column and one row.

    at     (x, y) of each paper
    years  (year, x where it begins, width), oldest first; years without papers are narrow
    lanes  (field, y where it begins, rows), from the top
    """

    at: dict[str, tuple[float, float]]
    years: list[tuple[int, float, float]]
    lanes: list[tuple[str, float, int]]


def place(papers: Mapping[str, Node]) -> Layout:
    """Lay papers out so that a parent stands left of its children and near their row. The same papers give the same
    layout; none gives an empty one."""
    if not papers:
        return Layout({}, [], [])
    cells: dict[tuple[str, int], list[Node]] = defaultdict(list)
    for paper in papers.values():
        cells[paper.field, paper.year].append(paper)
    size = Counter(paper.field for paper in papers.values())
    room = 4 if len(papers) < 120 else 2
    rows = {field: min(room, ceil(n / 3)) for field, n in size.items()}
    for (field, _), members in cells.items():
        rows[field] = max(rows[field], ceil(len(members) / COLUMNS))
    tops, lanes, top = {}, [], 0.0
    for field in _order(papers):
        tops[field] = top
        lanes.append((field, top, rows[field]))
        top += rows[field] + 1
    depths = _depths(papers)
    columns: dict[tuple[str, int], list[list[Node]]] = {}
    for (field, year), members in cells.items():
        members.sort(key=lambda p: (depths[p.key], p.key))
        columns[field, year] = [members[i : i + rows[field]] for i in range(0, len(members), rows[field])]
    years = _widths(columns)
    at: dict[str, tuple[float, float]] = {}
    for year, start, width in years:
        for field, lane_top, height in lanes:
            found = columns.get((field, year), [])
            for i, column in enumerate(found):
                for paper, row in _rows(column, height, lane_top, at, papers):
                    at[paper.key] = (start + (i + 0.5) * width / len(found), lane_top + row + 0.5)
    return Layout(at, years, lanes)


def _rows(
    column: list[Node], height: int, top: float, at: Mapping[str, tuple[float, float]], papers: Mapping[str, Node]
) -> list[tuple[Node, int]]:
    """The column's papers and their rows: each near its parents, and where no other paper lies on the way from them."""
    latest: dict[int, tuple[float, str]] = {}
    for key, (x, y) in at.items():
        row = int(y - top)
        if top <= y < top + height and x >= latest.get(row, (-1.0, ""))[0]:
            latest[row] = (x, key)

    def cost(paper: Node, row: int) -> float:
        own = [at[p] for p in paper.on if p in at and papers[p].field == paper.field]
        wish = sum(y for _, y in own) / len(own) - top - 0.5 if own else (height - 1) / 2
        x, key = latest.get(row, (-1.0, ""))
        between = bool(own) and key not in paper.on and x > min(x for x, _ in own)
        return abs(row - wish) + 2 * between

    free = list(range(height))
    found = []
    for paper in column:
        row = min(free, key=lambda r: (cost(paper, r), r))
        free.remove(row)
        found.append((paper, row))
    return found


def _widths(columns: Mapping[tuple[str, int], list[list[Node]]]) -> list[tuple[int, float, float]]:
    most: dict[int, float] = defaultdict(float)
    papers: dict[int, int] = defaultdict(int)
    for (_, year), found in columns.items():
        most[year] = max(most[year], len(found))
        papers[year] += sum(map(len, found))
    years, x, before = [], 0.0, min(most)
    for year in sorted(most):
        gap = year - before - 1
        each = min(_EMPTY, _GAP / gap) if gap > 0 else 0.0
        for empty in range(before + 1, year):
            years.append((empty, x, each))
            x += each
        years.append((year, x, _SPARSE if papers[year] <= 2 and len(most) > 8 else most[year]))
        x, before = x + years[-1][2], year
    return years


def _depths(papers: Mapping[str, Node]) -> dict[str, int]:
    """How many papers of its own year and field a paper descends from, in a chain."""
    found: dict[str, int] = {}

    def depth(key: str, above: tuple[str, ...] = ()) -> int:
        if key not in found:
            paper = papers[key]
            near = [
                p
                for p in paper.on
                if p in papers and p not in above and (papers[p].year, papers[p].field) == (paper.year, paper.field)
            ]
            found[key] = max((depth(p, (*above, key)) + 1 for p in near if p != key), default=0)
        return found[key]

    for key in papers:
        depth(key)
    return found


def _order(papers: Mapping[str, Node]) -> list[str]:
    """Fields so that edges between lanes are short: neighbours change places as long as that helps."""
    weight: dict[tuple[str, str], int] = defaultdict(int)
    for paper in papers.values():
        for parent in paper.on:
            if parent in papers and papers[parent].field != paper.field:
                weight[papers[parent].field, paper.field] += 1
    order = sorted({p.field for p in papers.values()})
    cost = _length(order, weight)
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i + 1, len(order)):
                other = [*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :]]
                if (new := _length(other, weight)) < cost:
                    order, cost, improved = other, new, True
    return order


def _length(order: Sequence[str], weight: Mapping[tuple[str, str], int]) -> int:
    lane = {field: i for i, field in enumerate(order)}
    return sum(n * abs(lane[a] - lane[b]) for (a, b), n in weight.items())


def ancestors(key: str, parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Everything a paper descends from, nearest first."""
    found: dict[str, None] = {}
    front = [key]
    while front:
        front = [p for k in front for p in parents.get(k, ()) if p not in found and p != key]
        found |= dict.fromkeys(front)
    return list(found)
