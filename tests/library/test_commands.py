"""`dx notes` as it is typed."""

import json
import subprocess
import sys

import pytest

from deltax.library import actions, arxiv
from deltax.library.commands import main
from deltax.library.join import Catalogue

LIST = (
    "## now\n- [ ] [DyT](https://arxiv.org/abs/2503.10622) ⏫\n\t- why tanh?\n- [x] olmo\n- [ ] kittens 📅 2025-01-01\n"
    "\nprose\n"
)
_PLACE = ("file", "line", "end", "within")


@pytest.fixture(autouse=True)
def papers(monkeypatch):
    monkeypatch.setattr(actions, "catalogue", lambda: Catalogue())


@pytest.fixture
def notes(tmp_path, capsys):
    path = tmp_path / "list.md"
    path.write_text(LIST, encoding="utf-8")
    assert main(["notes", "import", str(path)]) == 0
    capsys.readouterr()
    return path


def _out(capsys, *words, code=0):
    assert main(["notes", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def _json(capsys, *words):
    return json.loads(_out(capsys, *words, "--json"))


def test_import_shows_what_it_found(tmp_path, capsys):
    path = tmp_path / "list.md"
    path.write_text(LIST, encoding="utf-8")
    shown = _out(capsys, "import", str(path), "--dry-run")
    assert "3 entries: 1 with an identifier, 3 tasks, 1 read, 1 priorities, 1 dates" in shown
    assert "3 would be added" in shown and "list.md:7: text in no entry" in shown and "prose" in shown
    assert "no entries" in _out(capsys, "list")
    data = _json(capsys, "import", str(path))
    assert data["added"] == 3 and data["remarks"][0]["line"] == 7
    assert path.read_text(encoding="utf-8") == LIST


def test_list_show_search_todo_questions(notes, capsys):
    assert "3 works, 3 entries" in _out(capsys, "list")
    assert [e["title"] for e in _json(capsys, "list", "--state", "done")] == ["olmo"]
    assert [e["title"] for e in _json(capsys, "list", "--tag", "now", "--file", "list.md")] == [
        "DyT",
        "olmo",
        "kittens",
    ]
    assert [e["title"] for e in _json(capsys, "search", "tan")] == ["DyT"]
    shown = _json(capsys, "show", "arxiv:2503.10622v9")
    assert (shown["title"], shown["priority"], shown["questions"], shown["line"]) == ("DyT", "high", ["why tanh?"], 2)
    assert [e["title"] for e in _json(capsys, "todo")] == ["kittens", "DyT"]
    assert [q["question"] for q in _json(capsys, "questions")] == ["why tanh?"]
    assert "list.md:7" in _out(capsys, "list", "--remarks")
    assert [s["title"] for s in _json(capsys, "next")] == ["kittens", "DyT"]


def test_read_tag_edit_stay_in_the_library_until_asked(notes, capsys):
    _out(capsys, "read", "kittens", "--on", "2025-02-02")
    _out(capsys, "tag", "dyt", "norm")
    _out(capsys, "edit", "dyt", "--note", "try it", "--priority", "highest", "--title", "Dynamic Tanh")
    assert notes.read_text(encoding="utf-8") == LIST
    _out(capsys, "import", str(notes))
    shown = _json(capsys, "show", "Dynamic Tanh")
    assert shown["text"] == "- why tanh?\ntry it" and "norm" in shown["tags"] and shown["priority"] == "highest"
    _out(capsys, "read", "dynamic tanh", "--on", "2025-03-03", "--write-back")
    expected = LIST.replace(
        "- [ ] [DyT](https://arxiv.org/abs/2503.10622) ⏫",
        "- [x] [DyT](https://arxiv.org/abs/2503.10622) 🔺 ✅ 2025-03-03 #norm",
    )
    assert notes.read_text(encoding="utf-8") == expected.replace("tanh?\n", "tanh?\n\ttry it\n")
    shown = _json(capsys, "show", "Dynamic Tanh")
    assert shown["edited"] == ["title"] and shown["state"] == "done"
    assert _json(capsys, "import", str(notes))["unchanged_files"] == 1
    _out(capsys, "tag", "dynamic tanh", "--", "-norm")
    assert "norm" not in _json(capsys, "show", "Dynamic Tanh")["tags"]


def test_add_with_and_without_a_network(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(arxiv, "get", lambda url: asked.append(url))
    added = _json(capsys, "add", "arxiv:2503.10622", "--note", "read me", "--tag", "norm", "--priority", "high")
    assert (added["title"], added["state"], added["text"], added["tags"]) == (
        "arxiv:2503.10622",
        "todo",
        "read me",
        ["norm"],
    )
    assert asked == []
    known = {"2503.10622": arxiv.Metadata("2503.10622", "Transformers without Normalization", ("A B",), 2025, "")}
    monkeypatch.setattr(arxiv, "fetch", lambda library, ids: {i: known[i] for i in ids if i in known})
    assert _json(capsys, "fetch")["changed"] == 1
    shown = _json(capsys, "show", "2503.10622")
    assert (shown["title"], shown["year"], shown["authors"]) == ("Transformers without Normalization", 2025, ["A B"])
    assert "is in the library as entry 1" in _out(capsys, "add", "2503.10622", code=2)
    assert _json(capsys, "add", "some talk")["title"] == "some talk"


def test_what_is_in_no_section_is_exported_before_the_first(notes, capsys, tmp_path):
    _out(capsys, "add", "some talk")
    _out(capsys, "export", str(tmp_path / "out.md"))
    assert (tmp_path / "out.md").read_text(encoding="utf-8").startswith("- [ ] some talk ➕ ")


@pytest.mark.parametrize("suffix", [".bib", ".json", ".ris", ".md"])
def test_export_and_in_again(notes, capsys, tmp_path, suffix, monkeypatch):
    target = tmp_path / f"out{suffix}"
    _out(capsys, "export", str(target))
    before = [{k: v for k, v in e.items() if k not in _PLACE} for e in _json(capsys, "list")]
    assert "exists" in _out(capsys, "export", str(target), code=2)
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "second"))
    _out(capsys, "import", str(target))
    assert [{k: v for k, v in e.items() if k not in _PLACE} for e in _json(capsys, "list")] == before
    assert "your note files" in _out(capsys, "export", str(target), "--overwrite", "--format", "csl", code=2)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("show", "99"), "there is no entry 99"),
        (("show", "nothing"), "no entry is called"),
        (("read", "1", "--on", "tomorrow"), "is no day"),
        (("tag", "1", "a b"), "is no tag"),
        (("tag", "1", "--", "-nwo"), "did you mean 'now'"),
        (("edit", "1", "--title", " "), "cannot be empty"),
        (("edit", "1", "--title", "x", "--write-back"), "not written back"),
        (("export", "x.doc"), "which format"),
        (("import", "no/such/folder"), "no file or folder"),
        (("join", "--accept", "1", "dyt"), "there is no paper"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(notes, capsys, words, sentence):
    shown = _out(capsys, *words, code=2)
    assert sentence in shown and shown.startswith("dx: ") and shown.count("\n") == 1


def test_a_note_cannot_drive_the_terminal(tmp_path, capsys):
    (tmp_path / "n.md").write_text("- [ ] \x1b[31mred\x07 \u202e\n", encoding="utf-8")
    _out(capsys, "import", str(tmp_path / "n.md"))
    assert "\x1b" not in _out(capsys, "list") and "\x07" not in _out(capsys, "show", "1")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["notes", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "dx notes import" in shown and all(name in shown for name in ("search", "questions", "next", "export"))


def test_no_torch_and_nothing_heavy():
    names = "deltax.library.commands, deltax.library.readers, deltax.library.formats"
    code = f"import sys, {names}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    "words, says",
    [
        (("show", "9" * 30), "there is no entry"),
        (("add", "arxiv:2503.99"), "no arxiv id: write it as arxiv:2503.10622"),
        (("add", "doi:nonsense"), "no doi id"),
        (("edit", "1", "--year", "9" * 20), "is no year"),
    ],
)
def test_numbers_and_ids_that_cannot_be(notes, capsys, words, says):
    assert says in _out(capsys, *words, code=2)


def test_a_folder_without_markdown_says_how_bibliographies_come_in(tmp_path, capsys):
    (tmp_path / "refs.bib").write_text("@misc{a, title={A}}")
    assert "name the file itself" in _out(capsys, "import", str(tmp_path))
    assert "1 added" in _out(capsys, "import", str(tmp_path / "refs.bib"))


def test_fetch_with_a_limit_goes_on_with_what_is_not_known_yet(tmp_path, capsys, monkeypatch):
    (tmp_path / "l.md").write_text("".join(f"- [ ] https://arxiv.org/abs/2401.0000{n}\n" for n in range(1, 6)))
    asked: list[str] = []

    def fetch(library, ids):
        asked.extend(ids)
        found = {i: arxiv.Metadata(i, f"T {i}", (), 2024, "") for i in ids}
        with library.writing():
            for i, record in found.items():
                library.db.execute("INSERT INTO metadata VALUES (?,?,0)", (i, json.dumps(vars(record))))
        return found

    monkeypatch.setattr(arxiv, "fetch", fetch)
    _out(capsys, "import", str(tmp_path))
    for known in (2, 4, 5, 5):
        assert f"knows {known} of 5" in _out(capsys, "fetch", "--limit", "2")
    assert asked == [f"2401.0000{n}" for n in range(1, 6)]
