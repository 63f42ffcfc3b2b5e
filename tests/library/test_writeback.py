"""Written back: the bytes that say something else, and no others."""

import pytest

from deltax.errors import UserError
from deltax.library import tasks, writeback
from deltax.library.importing import import_paths
from deltax.library.store import Library

CRLF = (
    "\ufeff# list\r\n\r\n- [ ] [DyT](https://arxiv.org/abs/2503.10622) #norm ⏫ 📅 2025-03-01  \r\n"
    "\t- tanh  \r\n\t\t- $\\alpha x$\r\n"
    "* [ ] other\u00a0🔼\ufe0f\r\n\r\n\r\n## end\r\ntrailing"
).encode()


def _edit(path, title, edits):
    with Library() as library:
        import_paths(library, [path])
        (item,) = [item for item in library.items() if item.entry.title == title]
        before = library.in_file(item.id)
        written = writeback.write(before, library.edit(item.id, edits))
        import_paths(library, [path])
        library.settle(item.id, written)
        return before, library.item(item.id)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "list.md"
    path.write_bytes(CRLF)
    path.chmod(0o640)
    return path


def test_nothing_changes_nothing(path):
    _edit(path, "DyT", {})
    assert path.read_bytes() == CRLF


def test_a_tick(path):
    _, item = _edit(path, "DyT", {"state": "done", "dates": {"done": "2025-04-01"}})
    expected = CRLF.replace(b"- [ ] [DyT]", b"- [x] [DyT]").replace(
        b"2025-03-01  \r", "2025-03-01 ✅ 2025-04-01  \r".encode()
    )
    assert path.read_bytes() == expected
    assert path.stat().st_mode & 0o777 == 0o640
    assert item.entry.state == "done" and item.edits == {} and item.entry.task.dates.done == "2025-04-01"


def test_untick(path):
    _edit(path, "DyT", {"state": "done", "dates": {"done": "2025-04-01"}})
    _edit(path, "DyT", {"state": "todo", "dates": {"done": ""}})
    assert path.read_bytes() == CRLF


def test_priority_dates_and_tags(path):
    _, item = _edit(path, "other", {"priority": "low", "dates": {"due": "2025-05-06"}, "tags+": ["new"]})
    assert path.read_bytes() == CRLF.replace(
        "other\u00a0🔼\ufe0f".encode(), "other\u00a0🔽 📅 2025-05-06 #new".encode()
    )
    assert item.entry.tags == ("new",) and item.entry.task.priority == "low"
    _edit(path, "DyT", {"priority": "normal", "dates": {"due": ""}, "tags-": ["norm"]})
    assert b"(https://arxiv.org/abs/2503.10622)  \r\n" in path.read_bytes()


def test_text_keeps_the_bytes_of_lines_that_stay(path):
    before, item = _edit(path, "DyT", {"text": "- tanh  \n\t- $\\alpha x$\n- and a gain"})
    assert path.read_bytes() == CRLF.replace(b"x$\r\n", b"x$\r\n\t- and a gain\r\n")
    assert item.entry.text == before.text + "\n- and a gain"
    _edit(path, "DyT", {"text": ""})
    assert b"\t" not in path.read_bytes() and path.read_bytes().endswith(b"## end\r\ntrailing")
    _edit(path, "other", {"notes": ["one", "two"]})
    assert b"\r\n\tone\r\n\ttwo\r\n\r\n\r\n## end" in path.read_bytes()


def test_the_last_line_keeps_having_no_end(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"- [ ] a\n  - b")
    _edit(path, "a", {"notes": ["c"]})
    assert path.read_bytes() == b"- [ ] a\n  - b\n  c"


def test_bytes_that_are_not_text_stay(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"\xfa\xfe junk\n\n- [ ] caf\xe9 ok\n")
    data = path.read_bytes()
    with Library() as library:
        import_paths(library, [path])
        item = library.items()[0]
        path.write_bytes(data + b"")
        new = writeback.changed(data, library.in_file(item.id), library.edit(item.id, {"state": "done"}).entry)
    assert new == data.replace(b"[ ]", b"[x]")


def test_every_box_of_the_five_files_ticks_alone(five):
    """Each edit touches the one line of its entry: all 161 boxes."""
    count = 0
    with Library() as library:
        import_paths(library, [five])
        for item in library.items():
            if not item.entry.task.symbol:
                continue
            data = (five / "reading-list.md").read_bytes()
            state = "todo" if item.entry.state == "done" else "done"
            task = tasks.with_state(item.entry.task, state, "2026-01-01")
            dates = {"done": task.dates.done}
            after = library.edit(item.id, {"state": state, "dates": dates}).entry
            old, new = data.split(b"\n"), writeback.changed(data, library.in_file(item.id), after).split(b"\n")
            assert [n for n, (a, b) in enumerate(zip(old, new, strict=True), 1) if a != b] == [item.entry.origin.line]
            count += 1
    assert count == 161


def test_refusals_leave_the_file_alone(path, tmp_path):
    with Library() as library:
        import_paths(library, [path])
        item = library.items()[0]
        after = library.edit(item.id, {"state": "done"}).entry
        with pytest.raises(UserError, match="changed since"):
            writeback.changed(CRLF.replace(b"DyT", b"Dyt"), library.in_file(item.id), after)
        moved = writeback.changed(b"- [ ] inserted\r\n" + CRLF, library.in_file(item.id), after)
        assert moved == b"- [ ] inserted\r\n" + CRLF.replace(b"[ ] [DyT]", b"[x] [DyT]")
    page = tmp_path / "p.md"
    page.write_text("## [A](https://arxiv.org/abs/2106.09685)\ntext\n")
    with pytest.raises(UserError, match="no checkbox"):
        _edit(page, "A", {"state": "done"})
    with pytest.raises(UserError, match="comes from a heading"):
        other = tmp_path / "s.md"
        other.write_text("## sec\n- [ ] x\n")
        _edit(other, "x", {"tags-": ["sec"]})
    assert page.read_text() == "## [A](https://arxiv.org/abs/2106.09685)\ntext\n"
    _edit(page, "A", {"text": "text\nmore"})
    assert page.read_text() == "## [A](https://arxiv.org/abs/2106.09685)\ntext\nmore\n"
    with Library() as library:
        (kept,) = [item for item in library.items() if item.entry.title == "A"]
        assert kept.edits == {"state": "done"}
