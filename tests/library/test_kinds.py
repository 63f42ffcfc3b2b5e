"""Identifiers, names, dates and properties in every spelling and format; task lines written as they are read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltax.errors import UserError
from deltax.library import bibliography, formats, frontmatter, identifiers, names, readers, tasks, writeback
from deltax.library.files import decode
from deltax.library.importing import import_paths
from deltax.library.model import Dates, Entry, Identifier, Reference, Task
from deltax.library.store import Library

IDS = [
    Identifier("arxiv", "2106.09680"),
    Identifier("arxiv", "math/0309136"),
    Identifier("doi", "10.1007/978-3-319-24574-4_28"),
    Identifier("doi", "10.1002/(sici)1097-0258(19980815/30)17:15/16<1661::aid-sim968>3.0.co;2-2"),
    Identifier("openreview", "AL1fq05o7H"),
]
SPELLINGS = {
    "arxiv": ("{}", "arXiv:{}", "https://arxiv.org/abs/{}", "http://arxiv.org/pdf/{}v2.pdf", "arXiv: {} [cs.LG]",
              "https://www.alphaxiv.org/overview/{}", "10.48550/arXiv.{}", "https://doi.org/10.48550/arXiv.{}"),
    "doi": ("{}", "doi:{}", "DOI: {}", "https://doi.org/{}", "http://dx.doi.org/{}", "{}.", "doi.org/{}"),
    "openreview": ("openreview:{}", "https://openreview.net/forum?id={}", "https://openreview.net/pdf?id={}"),
}  # fmt: skip


@pytest.mark.parametrize("identifier", IDS, ids=str)
def test_one_identifier_in_each_spelling_and_each_format(identifier):
    for spelling in SPELLINGS[identifier.scheme]:
        text = spelling.format(identifier.value)
        if "://" in text and "<" in text:
            continue  # no URL holds a < as it is
        field = {"arxiv": "eprint", "doi": "doi", "openreview": "url"}[identifier.scheme]
        if text.startswith("10.48550"):
            field = "doi"
        bar = "DOI" if field == "doi" else "URL"
        read = {
            "bib": bibliography.read_bibtex(f"@misc{{k, title={{T}}, {field}={{{text}}}}}")[0][0][0],
            "csl": bibliography.read_csl(f'[{{"title": "T", "{bar}": "{text}"}}]')[0][0][0],
            "ris": bibliography.read_ris(
                f"TY  - GEN\nTI  - T\n{'DO' if bar == 'DOI' else 'UR'}  - {text}\nER  - \n"
            )[0][0][0],
            "csv": bibliography.read_csv(f'Title,{bar}\nT,"{text}"\n')[0][0][0],
        }  # fmt: skip
        page = f"---\ntitle: T\n{'arxiv' if field == 'eprint' else field}: {text}\n---\nx"
        read["page"] = readers.read("p.md", page.split("\n")).entries[0]
        for name, entry in read.items():
            assert [i.key for i in entry.reference.ids] == [identifier.key], (name, text)
    assert identifiers.arxiv("math.GT/0309136").key == identifiers.arxiv("math/0309136").key


def test_what_names_nothing_here_is_kept():
    """A DOI that is none, an eprint elsewhere, a second URL and a repeated field are still in the entry."""
    ((entry, _),), _ = bibliography.read_bibtex(
        "@article{a, title={T}, doi={nonsense}, eprint={hal-01}, eprinttype={hal}, note={x}, note={y}}"
    )
    assert {("doi", "nonsense"), ("eprint", "hal-01"), ("note", "x"), ("note-2", "y")} <= set(entry.reference.extra)
    ((entry, _),), _ = bibliography.read_ris("TY  - GEN\nTI  - T\nUR  - https://a.b\nUR  - https://c.d\nER  - \n")
    assert [link.url for link in entry.reference.links] == ["https://a.b", "https://c.d"]


NAMES = [
    names.Name("García Márquez", "Gabriel"),
    names.Name("Maaten", "Laurens", "van der"),
    names.Name("King", "Martin Luther", "", "Jr."),
    names.Name("The OpenAI Team"),
    names.Name("Doe", "Jane"),
    names.Name("OpenAI"),
]


@pytest.mark.parametrize("form", sorted(formats.NATIVE))
def test_names_keep_their_parts(form):
    written = formats.write([Entry(Reference("T", authors=tuple(NAMES), year=2020))], form)
    (back,) = formats.read(written, form)
    assert [names.shown(a).parts for a in back.reference.authors] == [name.parts for name in NAMES]
    if form in ("bibtex", "csl", "ris"):  # natively, where no comment of ours rides along
        bare = {"bibtex": "deltax = ", "csl": '"deltax":', "ris": "deltax: "}[form]
        assert bare not in written or form == "ris" or '"names"' not in written
    ((entry, _),), _ = bibliography.read_bibtex("@misc{a, title={T}, author={Moe, Max and others}}")
    assert entry.reference.authors == ("Max Moe",) and "Moe, Max and others" in formats.write([entry], "bibtex")


def test_kinds_and_dates_go_from_format_to_format():
    ((entry, _),), _ = bibliography.read_bibtex("@inproceedings{a, title={T}, booktitle={C}, date={2021-06-03}}")
    assert '"paper-conference"' in formats.write([entry], "csl") and "TY  - CONF" in formats.write([entry], "ris")
    assert "booktitle = {C}" in formats.write([entry], "bibtex")
    csl = '[{"title": "T", "type": "paper-conference", "issued": {"date-parts": [[2021, 6, 3]]}}]'
    ((entry, _),), _ = bibliography.read_csl(csl)
    assert "@inproceedings" in formats.write([entry], "bibtex")
    assert dict(entry.reference.extra)["date"] == "2021-06-03"
    shown = "".join(formats.write([entry], "csl").split())
    assert '"date-parts":[[2021,6,3]]' in shown and "DA  - 2021/06/03" in formats.write([entry], "ris")


def test_files_as_programs_and_people_write_them():
    ((entry, _),), _ = bibliography.read_ris("TY - JOUR\nTI - T\nAU - Doe, Jane\nER - \n")
    assert (entry.title, entry.reference.authors) == ("T", ("Jane Doe",))
    with pytest.raises(UserError, match="no RIS"):
        bibliography.read_ris("Title: T\n")
    text = decode("a.bib", "@misc{a, title={Café}}".encode("latin-1"))
    assert "Café" in text.lines[0] and "latin-1" in text.remarks[0].reason
    (found, failed) = bibliography.read_bibtex("@misc{a,\n title={No}\n author={N, O}}")
    assert (found[0][0].title, failed[0][0]) == ("No", 2)
    ((entry, _),), _ = bibliography.read_bibtex("@misc{a, title={H<sub>2</sub>O &amp; <i>x</i>}}")
    assert entry.title == "H2O & x"


@given(st.from_regex(r"[a-z0-9][a-zA-Z0-9.]{0,12}", fullmatch=True))
@settings(max_examples=80, deadline=None)
def test_a_property_is_the_text_that_is_written(text):
    if text not in ("null", "~"):
        assert frontmatter.read(["---", f"a: {text}", f"b: [{text}, x]", "---"]).values == {"a": text, "b": [text, "x"]}


_FIELDS = ["📅 2024-01-02", "✅\u00a02024-01-03", "[scheduled:: 2024-02-02]", "#a", "#b/c", "🆔 x1", "[rating:: 5]"]
_PRIORITIES = ["⏫", "🔽\ufe0f", "(priority:: low)", "[rating2:: x]"]
_ends = st.tuples(st.lists(st.sampled_from(_FIELDS), max_size=5, unique=True), st.sampled_from(_PRIORITIES)).flatmap(
    lambda pair: st.permutations([*pair[0], pair[1]])
)
_blocks = st.sampled_from(["", " ^block-1"])


@given(_ends, _blocks, st.sampled_from(["", "high", "normal"]), st.sampled_from(["", "2025-05-05"]))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_what_is_read(ends, block, priority, due):
    """Any fields in any order: after the edit the line reads as the edited task, and a block id still ends it."""
    line = " ".join(["read it", *ends]) + block
    before = tasks.peel(line, " ")
    dates = Dates(**{**vars(before.task.dates), "due": due, "done": "2025-06-06"})
    after = Task("done", "x", priority or before.task.priority, dates, before.task.fields)
    written = tasks.with_fields(line, before.task, after, ("new",), before.tags[:1])
    now = tasks.peel(written, "x")
    assert (now.text, now.task.dates, now.task.priority) == (before.text, after.dates, after.priority)
    assert set(now.tags) == {*before.tags[1:], "new"} and now.task.fields == before.task.fields
    assert written.endswith(block)


def test_what_obsidian_tasks_would_do_besides_is_refused(tmp_path):
    path = tmp_path / "t.md"
    path.write_text("- [ ] [A](https://arxiv.org/abs/1706.03762) 🔁 every day 📅 2024-05-01\n", encoding="utf-8")
    with Library() as library:
        import_paths(library, [path])
        (item,) = library.items()
        before = path.read_bytes()
        after = library.edit(item.id, {"state": "done", "dates": {"done": "2024-05-01"}})
        with pytest.raises(UserError, match="repeats"):
            writeback.write(library.in_file(item.id), after)
        assert path.read_bytes() == before
