"""Obsidian Tasks and Dataview marks, as the plugin's serializer reads them."""

import pytest

from deltax.library.model import Dates, Task
from deltax.library.tasks import DATE_MARKS, PRIORITY_MARKS, checkbox, peel, render_fields, with_state


def test_the_line_of_the_issue():
    line = peel("some Flow-DPM math ⏫ 📅 2025-01-31 ✅ 2025-02-01", "x")
    assert line.text == "some Flow-DPM math"
    assert line.task == Task("done", "x", "high", Dates(due="2025-01-31", done="2025-02-01"))


@pytest.mark.parametrize("mark, name", PRIORITY_MARKS.items())
@pytest.mark.parametrize("selector", ["", "\ufe0f"])
def test_priorities(mark, name, selector):
    assert peel(f"a {mark}{selector}").task.priority == name


@pytest.mark.parametrize("mark, field", DATE_MARKS.items())
@pytest.mark.parametrize("between", ["", " ", "\ufe0f ", "\u00a0", "\ufe0f\u00a0"])
def test_dates(mark, field, between):
    line = peel(f"read it {mark}{between}2021-08-29")
    assert (line.text, line.task.dates) == ("read it", Dates(**{field: "2021-08-29"}))


def test_a_mark_in_the_middle_is_text():
    line = peel("the ⏫ operator 📅 2024-01-01 explained")
    assert (line.text, line.task) == ("the ⏫ operator 📅 2024-01-01 explained", Task())


def test_tags_between_fields_and_everything_else():
    text = "x #a ⏫ #b/c 🔁 every week when done 🏁 keep 🆔 abc ⛔ d1,e2 🛫 2024-01-02 ^block"
    line = peel(text, " ")
    assert line.text == "x"
    assert line.tags == ("a", "b/c")
    assert line.task.priority == "high" and line.task.dates.start == "2024-01-02"
    fields = [("repeat", "every week when done"), ("onCompletion", "keep"), ("id", "abc"), ("dependsOn", "d1,e2")]
    assert line.task.fields == (*fields, ("block", "block"))


def test_dataview():
    line = peel("x [priority:: high] (due:: 2024-05-06) [completion:: 2024-05-07] [My Rating:: 5]", "x")
    assert line.text == "x" and line.task.priority == "high"
    assert line.task.dates == Dates(due="2024-05-06", done="2024-05-07")
    assert line.task.fields == (("my-rating", "5"),)


def test_an_impossible_date_is_kept_and_named():
    line = peel("x ⏫ 📅 2025-02-30")
    assert line.text == "x" and line.task.priority == "high" and line.task.dates.due == ""
    assert line.task.fields == (("due", "2025-02-30"),)
    assert "2025-02-30" in line.problems[0]


def test_twenty_passes_and_no_more():
    line = peel("x " + " ".join(f"#t{n}" for n in range(25)))
    assert line.text == "x #t0 #t1 #t2 #t3 #t4"
    assert len(line.tags) == 25  # tags inside the text count as well


@pytest.mark.parametrize(
    "box, symbol", [("[ ] a", " "), ("[x] a", "x"), ("[/]\u00a0a", "/"), ("[-] a", "-"), ("[ ]  a", " ")]
)
def test_checkbox(box, symbol):
    assert checkbox(box) == (symbol, "a")
    assert checkbox("[a](b)") is None and checkbox("[]") is None


def test_states_and_rendering_agree():
    for text in (
        "x ⏫ 📅 2024-01-01",
        "x #t 🔁 every day 🆔 a ⛔ b ➕ 2023-01-01 ✅ 2024-01-01",
        "x [rating:: 4] 🔽 ^b",
    ):
        line = peel(text, " ")
        assert peel(f"x {render_fields(line.task, line.tags)}", " ") == line
    done = with_state(peel("x").task, "done", "2024-02-03")
    assert (done.symbol, done.dates.done) == ("x", "2024-02-03")
    assert with_state(done, "todo", "2024-02-04").dates.done == ""
