"""Shapes of notes on files written here: what is an entry, and what stays the page's."""

from deltax.library.readers import read
from deltax.library.sentences import change, questions


def _titles(text: str, path: str = "notes.md"):
    return [entry.title for entry in read(path, text.split("\n")).entries]


def test_a_table_by_the_names_of_its_columns():
    text = (
        "| Paper | Year | Link | Status | Tags | Notes | Priority |\n|--|--|--|--|--|--|--|\n"
        "| A | 2020 | 2010.11929 | x | vit, vision | nice \\| good | ⏫ |\n"
        "| | | | | | lost | |\n| B | soon | | maybe | | | |"
    )
    reading = read("t.md", text.split("\n"))
    first, second = reading.entries
    assert (first.title, first.reference.year, first.state, first.tags) == ("A", 2020, "done", ("vit", "vision"))
    assert [str(i) for i in first.reference.ids] == ["arxiv:2010.11929"]
    assert first.task.priority == "high" and first.text == "nice | good"
    assert second.text == "Status: maybe\nYear: soon"
    assert [r.line for r in reading.remarks] == [4, 5]


def test_headings_without_a_link_above_one():
    text = "## FlashAttention\nhttps://arxiv.org/abs/2205.14135\ntiles\n### Method\nmore\n## Not a paper\nwords"
    reading = read("h.md", text.split("\n"))
    (entry,) = reading.entries
    assert entry.title == "FlashAttention" and str(entry.reference.ids[0]) == "arxiv:2205.14135"
    assert "### Method\nmore" in entry.text
    assert [(r.line, r.text) for r in reading.remarks] == [(7, "words")]


def test_a_diary_with_years_and_several_papers_a_day():
    text = (
        "# Diary\n## 2025-01-26\n[A](https://arxiv.org/abs/2106.09685)\n- x\n\n[code](https://github.com/a/b)\n\n"
        "[B](https://blog.example/b)\nwords\n## Monday, 3 Feb 2025\n[C](https://c.example)\n"
        "## 03/04/2025\n[D](https://d.example)"
    )
    entries = read("d.md", text.split("\n")).entries
    assert [(e.title, e.task.dates.noted) for e in entries] == [
        ("A", "2025-01-26"), ("B", "2025-01-26"), ("C", "2025-02-03"), ("D", ""),
    ]  # fmt: skip
    assert "[code]" in entries[0].text
    assert any("03/04/2025" in r.reason for r in read("d.md", text.split("\n")).remarks)


def test_a_daily_note_carries_its_day():
    (entry,) = read("vault/2025-03-18.md", ["- [ ] [DyT](https://arxiv.org/abs/2503.10622)"]).entries
    assert entry.task.dates.noted == "2025-03-18"


def test_a_file_a_paper():
    front = (
        "title: 'Attention'\nauthors: [A. Vaswani, N. Shazeer]\nyear: 2017\nrating: 5\ndoi: 10.48550/arXiv.1706.03762"
    )
    text = f"---\n{front}\nstatus: read\n---\n# x\nbody"
    (entry,) = read("p.md", text.split("\n")).entries
    assert (entry.title, entry.reference.year, entry.state) == ("Attention", 2017, "done")
    assert entry.reference.authors == ("A. Vaswani", "N. Shazeer")
    assert str(entry.reference.ids[0]) == "arxiv:1706.03762" and dict(entry.reference.extra)["rating"] == "5"
    (bare,) = read("FlashAttention.md", ["Tiles.", "See https://arxiv.org/abs/2205.14135"]).entries
    assert (bare.title, bare.text.split("\n")[0]) == ("FlashAttention", "Tiles.")


def test_a_published_garden_has_json_between_its_fences():
    text = '---\n{"dg-publish":true,"dg-home":true,"tags":["ml"],"dg-note-properties":{"rating":3}}\n---\n- [ ] a'
    reading = read("g.md", text.split("\n"))
    assert reading.entries[0].tags == ("ml", "gardenEntry") and reading.front["rating"] == 3


def test_plain_lists_and_labels():
    text = "- shopping\n- milk\n\n# x\n# y\n- attention:\n  - [A](https://arxiv.org/abs/2106.09685)\n  - other\n"
    text += "- [B](https://b.example) - why"
    reading = read("l.md", text.split("\n"))
    assert [(e.title, e.origin.section) for e in reading.entries] == [("A", ("y", "attention")), ("B", ("y",))]
    assert reading.entries[1].text == "why"
    assert [r.line for r in reading.remarks] == [1, 2, 8]


def test_prose_invents_nothing():
    text = "# Thoughts\n\nI read a lot.\n\n- one\n- two\n\n```\n- [ ] not a task\n```\n| a | b |\n|--|--|\n| 1 | 2 |"
    reading = read("prose.md", text.split("\n"))
    assert reading.entries == ()
    assert [(r.line, r.end) for r in reading.remarks] == [(3, 3), (5, 5), (6, 6), (8, 10), (11, 13)]


def test_latex_in_a_title_and_wiki_links():
    (entry,) = read("t.md", [r"- [ ] why $a_{1}*b*\dagger$ works, see [[Note|that]] and ![[pic]]"]).entries
    assert entry.title == r"why $a_{1}*b*\dagger$ works, see that and pic"
    assert [(link.url, link.role) for link in entry.reference.links] == [("Note", "wiki"), ("pic", "embed")]


def test_a_script_link_is_no_link():
    (entry,) = read("t.md", ["- [ ] [x](javascript:alert(1)) <script>alert(2)</script>"]).entries
    assert entry.reference.links == () and "<script>" in entry.title


def test_sentences():
    assert change("R-CNN but with RoI pooling", strict=False).base == "R-CNN"
    assert (change("It's just DETR, but with masks.").base, change("It's just DETR, but with masks.").change) == (
        "DETR",
        "masks",
    )
    assert change("same thing as grpo, except use confidence").base == "grpo"
    for prose in ("Very cool, but it needs a kernel.", "It works but with care", "we can but with effort do it", ""):
        assert change(prose) is None
    for cell in (
        "Very cool, but it needs custom CUDA kernel.",
        "It can be trained but slowly",
        "Nice but I can't run it",
    ):
        assert change(cell, strict=False) is None


def test_questions():
    found = questions(
        "- First? proof\n- Why ? Because.\n- questions:\n  - a\n  - b\n- c [What?](https://x.y?z=1)\nquestion: d"
    )
    assert [(q.text, q.answered) for q in found] == [
        ("Why ?", True), ("a", False), ("b", False), ("c What?", False), ("d", False),
    ]  # fmt: skip


def test_an_empty_box_is_no_entry():
    text = "- [ ] a\n- [ ]\n- [ ] #tag 📅 2025-01-01\n- [ ]\n\t- [b](https://arxiv.org/abs/2001.00010)\n- [ ] [](https://c.example)"
    reading = read("e.md", text.split("\n"))
    assert [entry.title for entry in reading.entries] == ["a", "b", "https://c.example"]
    assert [remark.line for remark in reading.remarks] == [2, 3]


def test_a_row_with_more_cells_than_the_head_is_named():
    text = "| Title | Notes |\n|--|--|\n| A | $a|b$ |\n| B | $a\\|b$ |\n| C |"
    reading = read("t.md", text.split("\n"))
    assert [(entry.title, entry.text) for entry in reading.entries] == [("A", "$a"), ("B", "$a|b$"), ("C", "")]
    assert [(remark.line, remark.text) for remark in reading.remarks] == [(3, "| A | $a|b$ |")]


def test_what_stands_in_a_page_is_its_text():
    """Own tasks, tables and links to other papers: a page is one entry."""
    text = (
        "---\narxiv: 2312.00752\n---\n## Notes\n- selective\n- [ ] try the code 📅 2025-05-01\n"
        "- https://arxiv.org/abs/2111.00396\n\n| model | top-1 |\n|--|--|\n| a | 1 |"
    )
    (page,) = read("Mamba.md", text.split("\n")).entries
    assert (page.title, page.origin.within) == ("Mamba", 0)
    assert "try the code" in page.text and page.text.endswith("| a | 1 |")
