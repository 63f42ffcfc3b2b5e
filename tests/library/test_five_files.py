"""Every entry of the five real files comes in, none twice, nothing invented: against counts made by hand."""

import re
from collections import Counter

from deltax.library.files import load
from deltax.library.readers import read
from deltax.library.sentences import change_of, questions


def _read(path):
    text = load(path)
    return read(path.name, text.lines), text.lines


def test_counts(one_of_five):
    path, expected = one_of_five
    reading, _ = _read(path)
    assert sum(not e.origin.within for e in reading.entries) == expected["entries"]
    assert sum(bool(e.origin.within) for e in reading.entries) == expected["nested"]
    assert sum(bool(e.reference.ids) for e in reading.entries) == expected["ids"]
    assert [r.line for r in reading.remarks] == expected["remarks"]
    assert Counter(e.state for e in reading.entries) == expected["states"]
    lines = [e.origin.line for e in reading.entries]
    assert len(set(lines)) == len(lines)
    if "sections" in expected:
        assert Counter(e.origin.section[0] for e in reading.entries) == expected["sections"]


def test_exact_entries(one_of_five):
    path, expected = one_of_five
    by_line = {e.origin.line: e for e in _read(path)[0].entries}
    for line, wanted in expected["exact"].items():
        entry = by_line[line]
        change = change_of(entry)
        found = {
            "title": entry.title,
            "name": entry.reference.name,
            "year": entry.reference.year,
            "ids": [str(i) for i in entry.reference.ids],
            "own": [link.url for link in entry.reference.links if link.role == "own"],
            "state": entry.state,
            "priority": entry.task.priority,
            "due": entry.task.dates.due,
            "done": entry.task.dates.done,
            "noted": entry.task.dates.noted,
            "section": list(entry.origin.section),
            "tags": list(entry.tags),
            "within": entry.origin.within,
            "base": change.base if change else None,
            "change": change.change if change else None,
        }
        assert {key: found[key] for key in wanted} == wanted, f"{path.name}:{line}"


def test_every_line_lies_somewhere(one_of_five):
    """Lines with text are in an entry, a heading, the front matter, a table's head, or a remark."""
    path, _ = one_of_five
    reading, lines = _read(path)
    covered = {n for e in reading.entries for n in range(e.origin.line, e.origin.end + 1)}
    covered |= {n for r in reading.remarks for n in range(r.line, r.end + 1)}
    if lines[0] == "---":
        covered |= set(range(1, lines.index("---", 1) + 2))
    heading = re.compile(r"#{1,6} |\*\*[A-Z ]+\*\*$|\|[- |]+\|$|\| Paper title ")
    left = [n for n, line in enumerate(lines, 1) if line.strip() and n not in covered and not heading.match(line)]
    assert left == []


def test_text_is_kept_as_written(one_of_five):
    """Nested text is the file's own lines less one common indent: LaTeX, backslashes and trailing spaces stay."""
    path, _ = one_of_five
    reading, lines = _read(path)
    checked = 0
    for entry in reading.entries:
        origin = entry.origin
        if origin.shape == "table":
            assert entry.text and entry.text in lines[origin.line - 1]
            continue
        if not origin.body:
            assert entry.text == ""
            continue
        body = "\n".join(lines[origin.body - 1 : origin.end]).strip("\n").split("\n")
        text = entry.text.split("\n")
        while body and not body[0].strip():
            body = body[1:]
        removed = {source.removesuffix(kept) for source, kept in zip(body, text, strict=True) if source.strip()}
        assert len(removed) == 1 and not removed.pop().strip()
        checked += 1
    assert checked or path.name == "delta-x.md"


def test_latex_survives(five):
    text = {e.origin.line: e.text for e in _read(five / "reading-list.md")[0].entries}
    assert r"have shared low-rank subspace (shared $UU^{\dagger}$) for all down-projections" in text[24]
    assert r"$\lVert W \rVert=\max \frac{{\lVert W x_{in} \rVert_{out}}}{\lVert x_{in} \rVert_{in}}.$" in text[251]
    assert text[251].count("\n1. gradients") == 1


def test_open_questions(five):
    found = {}
    for path in sorted(five.glob("*.md")):
        for entry in _read(path)[0].entries:
            for question in questions(entry.text):
                found[path.name, entry.origin.line, question.text[:24]] = question.answered
    assert found == {
        ("learning-space.md", 43, "This is very cool but it"): False,
        ("papers.md", 2, "Is recent progress in ma"): True,
        ("papers.md", 16, "Why ?"): True,
        ("papers.md", 33, "RNN < Attention ?"): False,
        ("papers.md", 56, "Same as QRNN?"): False,
        ("reading-list.md", 113, "why are all layers in th"): False,
        ("reading-list.md", 113, "what about image encoder"): False,
        ("reading-list.md", 113, 'logit lens seems "naive"'): False,
        ("reading-list.md", 113, "good results for end tas"): False,
        ("reading-list.md", 124, "if we take the best toke"): False,
        ("reading-list.md", 131, "how to know there's a do"): False,
        ("reading-list.md", 223, 'Somehow they match "high'): False,
        ("reading-list.md", 259, "why do we trust conditio"): False,
        ("reading-list.md", 309, "works well, however perf"): False,
        ("reading-list.md", 348, "but what are the targets"): True,
    }
