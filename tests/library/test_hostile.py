"""Files that break readers: reported by file and line, the rest imported, in bounded time."""

import os
import time

import pytest

from deltax.errors import UserError
from deltax.library.files import cycles, embeds, find, load
from deltax.library.importing import import_paths
from deltax.library.readers import read
from deltax.library.store import Library

MILLION = ["[" * 1_000_000, "[\n" * 100_000, "[](" * 300_000, "> " * 500_000, "- " * 400_000]
GOOD = "- [ ] [DyT](https://arxiv.org/abs/2503.10622)"


def _import(tmp_path, data: bytes):
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "bad.md").write_bytes(data)
    (tmp_path / "n" / "good.md").write_text(GOOD)
    start = time.process_time()
    with Library() as library:
        report = import_paths(library, [tmp_path / "n"])
        titles = [item.entry.title for item in library.items()]
        assert all(len(item.entry.text) < 1000 for item in library.items())
    assert "DyT" in titles
    return report, titles, time.process_time() - start


def test_a_line_of_50_megabytes(tmp_path):
    report, titles, seconds = _import(tmp_path, b"- [ ] before\n" + b"x" * 50_000_000 + b"\n\n- [ ] after\n")
    assert titles[:2] == ["before", "after"]
    (remark,) = report.remarks
    assert (remark.line, len(remark.text)) == (2, 50_000_000)
    assert seconds < 10


@pytest.mark.parametrize("text", MILLION)
def test_a_million_brackets(tmp_path, text):
    _, titles, seconds = _import(tmp_path, b"- [ ] before\n\n" + text.encode() + b"\n\n- [ ] after\n")
    assert "before" in titles and "after" in titles
    assert seconds < 10


def test_many_short_lines_of_brackets_in_entries(tmp_path):
    lines = "".join(f"- [ ] {'[' * 3000}a{']' * 3000}\n" for _ in range(20))
    _, titles, seconds = _import(tmp_path, lines.encode())
    assert len(titles) == 21 and seconds < 10


def test_bytes_that_are_not_utf8(tmp_path):
    report, titles, _ = _import(tmp_path, b"- [ ] caf\xe9\n- [ ] fine\n")
    assert titles[:2] == ["caf\ufffd", "fine"]
    assert [(r.line, "0xe9" in r.reason) for r in report.remarks] == [(1, True)]


def test_utf16_and_zero_bytes(tmp_path):
    report, _, _ = _import(tmp_path, "- [ ] a".encode("utf-16"))
    assert "UTF-16" in report.remarks[0].reason
    (tmp_path / "zero.md").write_bytes(b"- [ ] a\x00b\n")
    assert load(tmp_path / "zero.md").remarks[0].line == 1


@pytest.mark.parametrize(
    "front, line",
    [
        ("tags: [a", 2), ("a: b\n\tc: d", 3), ("- a\n- b", 2), ('{"a": 1', 2), ("a: &x [*x]", 2), ("a: 2024-99-99", 1),
        ("a: " + "[" * 2000, 1),
    ],
)  # fmt: skip
def test_broken_front_matter(front, line):
    reading = read("f.md", f"---\n{front}\n---\n{GOOD}".split("\n"))
    assert [e.title for e in reading.entries] == ["DyT"]
    (remark,) = reading.remarks
    assert "front matter" in remark.reason and line <= remark.line <= line + 1


def test_front_matter_never_closed():
    reading = read("f.md", f"---\ntags: a\n\n{GOOD}".split("\n"))
    assert [e.title for e in reading.entries] == ["DyT"] and "never closed" in reading.remarks[0].reason


def test_cyclic_embeds(tmp_path):
    (tmp_path / "a.md").write_text(f"{GOOD}\n\n![[b]]\n")
    (tmp_path / "b.md").write_text("- [ ] b\n![[c#part]]\n")
    (tmp_path / "c.md").write_text("- [ ] c\n\n\n![[a|x]] ![[c]] ![[nowhere]]\n")
    with Library() as library:
        report = import_paths(library, [tmp_path])
        assert len(library.items()) == 3
    found = [(os.path.basename(r.path), r.line, r.reason) for r in report.remarks if "embeds" in r.reason]
    assert found == [("c.md", 4, "embeds itself: a > b > c > a"), ("c.md", 4, "embeds itself: c > c")]
    chain = {f"{n}.md": [(1, str(n + 1))] for n in range(20_000)}
    assert cycles(chain) == []
    assert embeds(["`x` [[a]] ![[b]]"]) == [(1, "b")]


def test_a_file_that_vanishes(tmp_path, monkeypatch):
    import deltax.library.importing as importing

    (tmp_path / "a.md").write_text(GOOD)
    (tmp_path / "b.md").write_text("- [ ] b")
    paths = list(find([tmp_path]))
    monkeypatch.setattr(importing.files, "find", lambda given: iter(paths))
    (tmp_path / "b.md").unlink()
    with Library() as library:
        report = import_paths(library, [tmp_path])
        assert [item.entry.title for item in library.items()] == ["DyT"]
    assert [os.path.basename(r.path) for r in report.remarks] == ["b.md"]


def test_folders_that_link_to_themselves(tmp_path):
    (tmp_path / "a.md").write_text(GOOD)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / ".obsidian").mkdir()
    (tmp_path / ".obsidian" / "hidden.md").write_text(GOOD)
    (tmp_path / "same.md").symlink_to(tmp_path / "a.md")
    assert [path.name for path in find([tmp_path, tmp_path / "a.md"])] == ["a.md"]


def test_what_does_not_exist_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        list(find([tmp_path / "none"]))
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.bib"):
        list(find([tmp_path / "x.pdf"]))


def test_a_library_that_is_none(home):
    home.mkdir()
    (home / "library.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="DELTAX_HOME"):
        Library()
