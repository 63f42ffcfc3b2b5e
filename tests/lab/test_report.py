"""Reports and the terminal say what was found, and nothing that a recipe's name could smuggle in."""

import json
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from fake_runs import Truth
from rich.console import Console

from deltax import compare
from deltax.errors import UserError
from deltax.lab import report, terminal
from deltax.lab.engine import Event
from deltax.train.job import Job

HOSTILE = '<script>alert("x")</script> | [red]$a$ & `b` *c*'


@pytest.fixture
def record(tiny, store, world) -> dict:
    lost = Truth(gain=1.3, diverges=lambda job: job.seed == 3 or job.lr_scale > 3)
    world({"gpt+dyt": Truth(gain=1.4, best=2.5), "gpt+alibi": lost}, bowl=0.2)
    return compare(tiny(), tiny("gpt+dyt"), tiny("gpt+alibi"), store=store).to_json()


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "use", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_holds_all_and_asks_for_nothing(record):
    text = report.html(record)
    page = Page(text)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    fetched = {a.get(k) for _, a in page.tags for k in ("src", "href", "xlink:href")} - {None}
    assert all(link.startswith("#") for link in fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for needed in (
        record["scale"],
        record["command"],
        "depends on the rate",
        "1 of 5 runs diverged",
        "Holm",
        "gain per FLOP",
    ):
        assert needed in page.text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text


def test_every_row_shows_its_own_figures(record):
    dyt = record["rows"][1]
    head, x, y, broken = report.results(record)
    assert [x[0], y[0], broken[0]] == ["gpt", "gpt+dyt", "gpt+alibi"]
    value = dyt["against"]["gains"]["flop"]["value"]
    assert y[head.index("gain per FLOP")].startswith(f"{value:.2f} [")
    assert y[1] == f"{dyt['score']:.4f}" and broken[1] == broken[2] == "diverged"
    assert f"{abs(dyt['against']['mean']):.4f}" in y[2]


def test_what_lies_beyond_the_ladder_is_short_and_explained(record):
    gains = record["rows"][1]["against"]["gains"]
    gains["token"] |= {"shown": "< 0.5 (beyond the ladder)"}
    gains["flop"] |= {"shown": "1.78 [1.56, inf]"}
    assert report.results(record)[2][4:6] == ["< 0.5", "1.78 [1.56, ∞)"]
    out = StringIO()
    terminal.show(record, Console(file=out, width=400))
    for text in (Page(report.html(record)).text, report.markdown(record).replace("\\", ""), out.getvalue()):
        assert "with > or < a gain lies beyond the ladder; ∞ is an end beyond it" in text
    gains["token"]["shown"] = gains["flop"]["shown"] = gains["second"]["shown"] = "1.10 [1.00, 1.20]"
    assert report.legend(record) == "" and "∞" not in report.html(record)


def test_hostile_names_are_only_text(record):
    for row in record["rows"]:
        row["name"] = HOSTILE
    record["rows"][1]["changes"] = [(HOSTILE, HOSTILE, HOSTILE)]
    record["scale"] = record["command"] = HOSTILE
    page = Page(report.html(record))
    assert "script" not in {tag for tag, _ in page.tags} and HOSTILE in page.text
    markdown = report.markdown(record)
    assert "<script>" not in re.sub(r"```sh.*?```|`[^`]*`", "", markdown.replace("\\<", ""), flags=re.DOTALL)
    out = StringIO()
    terminal.show(record, Console(file=out, width=400))
    assert HOSTILE in out.getvalue()


def test_all_rows_of_a_markdown_table_are_as_wide(record):
    record["rows"][1]["name"] = HOSTILE
    lines = [line for line in report.markdown(record).splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(widths[: len(widths) // 2]) == {widths[0]} and set(widths[len(widths) // 2 :]) == {widths[-1]}


def test_a_report_is_saved_whole(record, tmp_path):
    for name in ("a.html", "deep/a.md", "a.json"):
        assert report.save(record, tmp_path / name).read_text()
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(record))
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    with pytest.raises(UserError, match=r"\.html or \.md or \.json"):
        report.save(record, tmp_path / "a.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another place"):
        report.save(record, tmp_path / "file" / "a.html")


def test_without_a_ladder_the_page_says_so(tiny, store, world):
    world({"gpt+dyt": Truth(diverges=lambda job: True)})
    c = compare(tiny(), tiny("gpt+dyt"), store=store, ladder="off")
    page = Page(report.html(c))
    assert "no ladder: switched off" in page.text and "gain per" not in page.text
    assert "gpt+dyt: " in report.verdicts(c.to_json())[0]


def test_live_progress_counts_every_run_once(tiny, store, world):
    made = world({"gpt+dyt": Truth()})
    for terminal_or_not in (True, False):
        out = StringIO()
        live = terminal.Live(Console(file=out, force_terminal=terminal_or_not, width=100))

        def execute(jobs, *, on_event, live=live, **settings):
            results = made.execute(jobs)
            for i, job in enumerate(jobs):
                on_event(Event("started", job, i, len(jobs)))
                on_event(Event("step", job, i, len(jobs), step=7, loss=2.5))
                on_event(Event("finished", job, i + 1, len(jobs), result=results[job.id]))
            return results

        made_compare = __import__("sys").modules["deltax.lab.compare"]
        made_compare.execute = execute
        with live:
            compare(tiny(), tiny("gpt+dyt"), store=store, on_event=live.hear)
        assert len(live._ended) == live._planned == 32 and not live._runs
        assert "you can see a gain of" in out.getvalue()
        assert terminal_or_not or "32/32 gpt" in out.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_tables_keep_words_and_figures_whole(record, width):
    out = StringIO()
    for row in record["rows"]:
        row |= {"rate": 13.1, "tokens_per_second": 123_456.0}
    record["rows"][1]["name"] = "gpt+rope+swiglu+rms-norm"
    terminal.show(record, Console(file=out, width=width))
    for rows in (report.results(record), report.costs(record)):
        for word in " ".join(rows[0]).split():
            assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", out.getvalue()), word
    for row in report.costs(record)[1:]:
        assert all(word in out.getvalue() for cell in row[1:] for word in cell.split())
    assert out.getvalue().count("×13.1") == len(record["rows"])


def test_a_run_in_words(tiny):
    assert terminal.alone(Job(tiny("gpt+dyt"), 0, 40, 2.0)) == "gpt+dyt, seed 0, rate ×2, 40 steps"
    assert terminal.name(Job(tiny("gpt+dyt"), 3, 40, 2.0)) == "gpt+dyt, pair 3, rate ×2, 40 steps"
