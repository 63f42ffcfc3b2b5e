"""What the library promises: importing again changes nothing, edits survive, two processes may work at once."""

import multiprocessing
import shutil
import time

import pytest

from deltax.errors import UserError
from deltax.library.importing import import_paths
from deltax.library.model import flat
from deltax.library.store import Library

LIST = """\
## now
- [ ] [DyT](https://arxiv.org/abs/2503.10622)
	- tanh
- [ ] thunderkittens
- [x] olmo ✅ 2025-01-02
	- stable
	- more
- [ ] plain one
"""


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes" / "list.md"
    path.parent.mkdir()
    path.write_text(LIST, encoding="utf-8")
    return path


def _all(library):
    return [(item.id, flat(item.entry), item.entry.origin) for item in library.items()]


def test_importing_twice_changes_nothing(notes, five):
    with Library() as library:
        first = import_paths(library, [notes, five])
        before = _all(library)
        assert first.added == len(before) > 200
        dump = list(library.db.iterdump())
        again = import_paths(library, [five, notes, notes.parent])
        assert (again.added, again.updated, again.removed, again.unchanged_files) == (0, 0, 0, 6)
        assert _all(library) == before and list(library.db.iterdump()) == dump


def test_works_of_the_five_files(five):
    """220 entries; nine of them speak again of a paper that another one speaks of."""
    with Library() as library:
        import_paths(library, [five])
        assert library.count() == (220, 211)
        several = {}
        for item in library.items():
            several.setdefault(item.work, []).append(
                (item.entry.origin.path.rpartition("/")[2], item.entry.origin.line)
            )
        assert sorted(group for group in several.values() if len(group) > 1) == [
            [("delta-x.md", 20), ("learning-space.md", 63), ("reading-list.md", 50)],
            [("diary.md", 10), ("reading-list.md", 249)],
            [("diary.md", 19), ("learning-space.md", 39), ("reading-list.md", 321)],
            [("reading-list.md", 15), ("reading-list.md", 56)],
            [("reading-list.md", 23), ("reading-list.md", 39)],
            [("reading-list.md", 155), ("reading-list.md", 169)],
            [("reading-list.md", 229), ("reading-list.md", 269)],
        ]


def test_dry_run_changes_nothing(notes):
    with Library() as library:
        assert import_paths(library, [notes], dry_run=True).added == 4
        assert library.count() == (0, 0) and library.sources() == {}


def test_an_edited_file_updates_only_what_changed(notes):
    with Library() as library:
        import_paths(library, [notes])
        before = {item.entry.title: item for item in library.items()}
        library.edit(before["thunderkittens"].id, {"state": "done", "tags+": ["gpu"], "dates": {"done": "2025-05-05"}})
        library.edit(before["DyT"].id, {"notes": ["mine"]})
        text = (
            LIST.replace("tanh", "tanh only")
            .replace("- [ ] plain one\n", "")
            .replace("## now\n", "## now\n- [ ] new\n")
        )
        notes.write_text(text.replace("thunderkittens", "ThunderKittens 2 ⏫"), encoding="utf-8")
        report = import_paths(library, [notes])
        assert (report.added, report.updated, report.removed, report.unchanged) == (1, 2, 1, 1)
        after = {item.entry.title: item for item in library.items()}
        assert set(after) == {"new", "DyT", "ThunderKittens 2", "olmo"}
        assert after["DyT"].id == before["DyT"].id and after["DyT"].entry.text == "- tanh only\nmine"
        kittens = after["ThunderKittens 2"]
        assert kittens.id == before["thunderkittens"].id and kittens.entry.task.priority == "high"
        assert (
            kittens.entry.state == "done"
            and "gpu" in kittens.entry.tags
            and kittens.entry.task.dates.done == "2025-05-05"
        )
        assert after["olmo"].id == before["olmo"].id and after["olmo"].entry.origin.line == 6


def test_an_edit_outweighs_the_file_and_says_so(notes):
    with Library() as library:
        import_paths(library, [notes])
        number = library.items()[0].id
        library.edit(number, {"priority": "high"})
        notes.write_text(LIST.replace("10622)", "10622) 🔽"), encoding="utf-8")
        report = import_paths(library, [notes])
        assert library.item(number).entry.task.priority == "high"
        assert [(r.line, "priority" in r.reason) for r in report.remarks] == [(2, True)]


def test_an_edited_entry_that_leaves_its_file_stays(notes):
    with Library() as library:
        import_paths(library, [notes])
        numbers = [item.id for item in library.items()]
        library.edit(numbers[1], {"notes": ["keep me"]})
        notes.write_text("- [ ] nothing else", encoding="utf-8")
        import_paths(library, [notes])
        assert [(item.id, item.gone) for item in library.items() if item.gone] == [(numbers[1], True)]
        notes.write_text(LIST, encoding="utf-8")
        import_paths(library, [notes])
        assert not library.item(numbers[1]).gone and library.item(numbers[1]).entry.text == "keep me"


def test_a_file_that_moves_keeps_its_edits(notes):
    with Library() as library:
        import_paths(library, [notes])
        number = library.items()[0].id
        library.edit(number, {"state": "done"})
        notes.rename(notes.with_name("moved.md"))
        report = import_paths(library, [notes.parent])
        assert report.added == 0 and library.item(number).entry.origin.path.endswith("moved.md")
        assert library.item(number).entry.state == "done"
        shutil.copy(notes.with_name("moved.md"), notes.with_name("copy.md"))
        assert import_paths(library, [notes.parent]).added == 4


def test_search_ranks_titles_first_and_takes_any_query(notes):
    with Library() as library:
        import_paths(library, [notes])
        assert [item.entry.title for item in library.search("dyt")] == ["DyT"]
        assert [item.entry.title for item in library.search("tan")] == ["DyT"]
        assert library.search('"thunderkittens" OR') != []
        for query in ('"', "(", "a*b AND", "NEAR(", "title:x", "-", "", "$UU^{\\dagger}$", "'; DROP TABLE entries"):
            library.search(query)
        assert library.count() == (4, 4)


def test_edits_are_checked():
    with Library() as library:
        with pytest.raises(UserError, match="did you mean 'state'"):
            library.edit(1, {"stat": "done"})
        with pytest.raises(UserError, match="did you mean 'done'"):
            library.edit(1, {"state": "doen"})
        with pytest.raises(UserError, match="no entry 1"):
            library.edit(1, {"state": "done"})


def _import_in_a_process(folder, go):
    go.wait(20)
    with Library() as library:
        for _ in range(3):
            import_paths(library, [folder])


def test_two_processes_at_once(tmp_path):
    folder = tmp_path / "vault"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n}.md").write_text("".join(f"- [ ] entry {n} {m}\n" for m in range(5)))
    context = multiprocessing.get_context("fork")
    go = context.Event()
    workers = [context.Process(target=_import_in_a_process, args=(folder, go)) for _ in range(2)]
    for worker in workers:
        worker.start()
    time.sleep(0.1)
    go.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with Library() as library:
        assert library.count() == (300, 300)
