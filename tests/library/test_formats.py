"""Out and back without loss, and the files that Zotero and Semantic Scholar write."""

import json
import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltax.errors import UserError
from deltax.library import formats
from deltax.library.files import load
from deltax.library.importing import import_paths
from deltax.library.model import PRIORITIES, Dates, Entry, Identifier, Link, Origin, Reference, Task, flat
from deltax.library.readers import read
from deltax.library.store import Library

FORMATS = sorted(formats.NATIVE)


@pytest.mark.parametrize("form", FORMATS)
def test_the_five_files_come_back_whole(five, form):
    entries = [e for path in sorted(five.glob("*.md")) for e in read(path.name, load(path).lines).entries]
    back = formats.read(formats.write(entries, form), form)
    assert [flat(e) for e in back] == [flat(e) for e in entries] and len(back) == 220


_plain = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=30)
_plain = _plain.map(str.strip).filter(bool)
_nasty = st.sampled_from(
    [
        *(
            "a {b",
            "}",
            "$x_{1}$ & 50% #1",
            "a|b\\|c",
            "@misc{x,",
            "- [ ] x",
            "## h",
            "--> <!-- deltax {} -->",
            "```",
            "1. x",
        ),
        *(
            "https://arxiv.org/abs/2106.09685",
            "**x**",
            "x ⏫ 📅 2024-01-01",
            "TY  - GEN",
            "\\frac{{a}",
            "a  b",
            "| x |",
        ),
        *("[a](b) [c]", "<!-- deltax {} -->", "x: y", "ER  - "),
    ]
)
_line = st.one_of(_plain, _nasty)
_ids = st.sampled_from(
    [Identifier("arxiv", "2106.09685", "v2"), Identifier("doi", "10.1000/x"), Identifier("openreview", "M3Yd3QyRG4")]
)
_urls = st.sampled_from(["https://a.b/c", "https://a.b/(c) d", "x"])
_dates = st.sampled_from(["", "2024-02-29"])


def _few(values):
    return st.lists(values, max_size=2).map(tuple)


_references = st.builds(
    Reference,
    title=_line,
    name=st.one_of(st.just(""), _line),
    authors=_few(st.one_of(_plain, st.just("van der Berg, A."))),
    year=st.one_of(st.none(), st.integers(1, 3000)),
    venue=st.one_of(st.just(""), _line),
    ids=_few(_ids).map(lambda ids: tuple(dict.fromkeys(ids))),
    links=_few(st.builds(Link, _urls, _line, st.sampled_from(["own", "mention", "wiki"]))),
    extra=_few(st.tuples(st.sampled_from(["volume", "Note", "citekey", "type", "title"]), _line)),
)
_tasks = st.builds(
    Task,
    state=st.sampled_from(["", "todo", "done"]),
    symbol=st.sampled_from(["", " ", "x", "/"]),
    priority=st.sampled_from(PRIORITIES),
    dates=st.builds(Dates, due=_dates, done=_dates, noted=st.sampled_from(["", "--01-26"])),
    fields=_few(st.tuples(st.sampled_from(["repeat", "id", "block", "rating"]), _line)),
)
_texts = st.lists(st.one_of(st.just(""), _line, _line.map("\t- {}".format)), max_size=4).map("\n".join)
_sections = st.builds(Origin, section=_few(_line))
_entries = st.builds(Entry, reference=_references, task=_tasks, tags=_few(_line), text=_texts, origin=_sections)
_NO_SHRINK = (Phase.explicit, Phase.generate)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=_NO_SHRINK)
@given(entries=st.lists(_entries, max_size=4))
def test_any_entries_come_back_whole(form, entries):
    back = formats.read(formats.write(entries, form), form)
    assert [flat(e) for e in back] == [flat(e) for e in entries]


@pytest.mark.parametrize("form", FORMATS)
def test_native_fields_need_no_carrier(form):
    """What NATIVE promises is in the file itself: without what rides along it is still there."""
    ids = (Identifier("arxiv", "2106.09685"),)
    reference = Reference(
        "LoRA & co",
        "LoRA",
        ("Edward Hu", "Ada Lovelace"),
        2021,
        "ICLR",
        ids,
        (Link("https://arxiv.org/abs/2106.09685", "LoRA & co"),),
    )
    task = Task("done", "x", "high", Dates(due="2025-01-02", done="2025-01-03"), (("id", "a1"),))
    entry = Entry(reference, task, ("peft", "low/rank"), "W + BA", Origin(section=("peft",)))
    text = formats.write([entry], form)
    without = {"bibtex": r"\tdeltax = .*", "csl": r'"custom"', "ris": r"N1  - deltax.*\n"}
    bare = re.sub(without.get(form, r"\s*<!-- deltax .*? -->"), '"x"' if form == "csl" else "", text)
    assert bare != text
    seen, true = flat(formats.read(bare, form)[0]), flat(entry)
    carried = {
        "first link": "links",
        "dates of Tasks": "dates",
        "text on one line": "text",
        "ids: one arXiv, one DOI": "ids",
    }
    for promise in formats.NATIVE[form]:
        name = carried.get(promise, promise)
        if name == "links":
            assert seen[name][0][0] == true[name][0][0]
        elif name == "extra":
            assert set(map(tuple, true[name])) <= set(map(tuple, seen[name]))
        elif name == "tags" and form == "obsidian":
            assert set(seen[name]) == set(true[name])
        else:
            assert seen[name] == true[name], name


def test_an_edit_made_elsewhere_wins():
    entry = Entry(Reference("A {title} 50%", year=2020), text="a }\nb")
    text = formats.write([entry], "bibtex")
    assert "A" in text and formats.read(text, "bibtex")[0].text == "a }\nb"
    edited = formats.read(
        text.replace("year = {2020}", "year = {2021}").replace("annote = {a )", "annote = {changed"), "bibtex"
    )[0]
    assert edited.reference.year == 2021 and edited.text.startswith("changed")
    assert edited.title == "A {title} 50%"


ZOTERO_BIB = r"""
@string{iclr = "ICLR"}
@inproceedings{zhu_transformers_2025, title = {Transformers without {Normalization} \& $\tanh$},
  author = {Zhu, Jiachen and Chen, Xinlei and Schr{\"o}der, K.}, date = {2025-03-13}, booktitle = iclr,
  doi = {10.48550/arXiv.2503.10622}, keywords = {norm, DyT}, file = {Full Text:C\:\\x.pdf:application/pdf},
  abstract = {We ...}}
@article{Vaswani2017AttentionIA, title={Attention is All you Need}, author={Ashish Vaswani and Noam M. Shazeer},
  journal={ArXiv}, year={2017},
  url={https://api.semanticscholar.org/CorpusID:13756489}, eprint={1706.03762}, archivePrefix={arXiv}}
@misc{broken, title = {never closed
"""


def test_bibtex_of_zotero_and_semantic_scholar(tmp_path):
    path = tmp_path / "refs.bib"
    path.write_text(ZOTERO_BIB, encoding="utf-8")
    with Library() as library:
        report = import_paths(library, [path])
        first, second = [item.entry for item in library.items()]
        again = import_paths(library, [path])
    assert first.title == r"Transformers without Normalization & $\tanh$"
    assert first.reference.authors == ("Jiachen Zhu", "Xinlei Chen", "K. Schröder")
    assert (first.reference.year, first.reference.venue, first.tags) == (2025, "ICLR", ("norm", "DyT"))
    assert [str(i) for i in first.reference.ids] == ["arxiv:2503.10622"]
    extra = dict(first.reference.extra)
    assert (
        extra["citekey"] == "zhu_transformers_2025"
        and extra["type"] == "inproceedings"
        and extra["abstract"] == "We ..."
    )
    assert second.title == "Attention is All you Need" and [str(i) for i in second.reference.ids] == [
        "arxiv:1706.03762"
    ]
    assert len(report.remarks) == 1 and "broken" in report.remarks[0].text and report.remarks[0].line > 8
    assert again.unchanged_files == 1
    back = formats.read(formats.write([first, second], "bibtex"), "bibtex")
    assert [flat(e) for e in back] == [flat(first), flat(second)]


def test_ris_csl_and_csv(tmp_path):
    (tmp_path / "a.ris").write_text(
        "TY  - CONF\nTI  - Mask2Former\nAU  - Cheng, Bowen\nAU  - Misra, Ishan\n"
        "PY  - 2022\nT2  - CVPR\nDO  - 10.1109/X.1\n"
        "UR  - https://arxiv.org/abs/2112.01527\nKW  - masks\nN1  - good\nER  - \n\nTY  - JOUR\nAU  - Nobody\nER  - \n"
    )
    csl = [
        {
            "id": "a/1",
            "type": "article-journal",
            "title": "LoRA",
            "author": [{"family": "Hu", "given": "Edward"}, {"literal": "MS"}],
        }
        | {
            "issued": {"date-parts": [["2021", 6]]},
            "note": "arXiv: 2106.09685 [cs]\nread twice",
            "container-title": "arXiv",
        },
        {"id": "b"},
        "nonsense",
    ]
    (tmp_path / "b.json").write_text(json.dumps(csl))
    (tmp_path / "c.csv").write_text(
        '"Key","Item Type","Publication Year","Author","Title","Publication Title","DOI","Url",'
        '"Manual Tags","Notes","Extra"\n'
        '"K1","preprint","2022","Dao, Tri; Fu, Dan","FlashAttention","","","https://arxiv.org/abs/2205.14135",'
        '"io; gpu","two\nlines","arXiv:2205.14135 [cs]"\n'
        '"K2","book","","","","","","","","",""\n'
    )
    with Library() as library:
        report = import_paths(library, [tmp_path / name for name in ("a.ris", "b.json", "c.csv")])
        ris, csl_, csv_ = [item.entry for item in library.items()]
    assert (ris.title, ris.reference.authors, ris.reference.venue) == (
        "Mask2Former",
        ("Bowen Cheng", "Ishan Misra"),
        "CVPR",
    )
    assert [str(i) for i in ris.reference.ids] == ["doi:10.1109/x.1", "arxiv:2112.01527"] and ris.text == "good"
    assert (csl_.reference.year, csl_.reference.authors) == (2021, ("Edward Hu", "MS"))
    assert [str(i) for i in csl_.reference.ids] == ["arxiv:2106.09685"] and dict(csl_.reference.extra)[
        "note"
    ] == "read twice"
    assert (csv_.reference.authors, csv_.tags, csv_.text) == (("Tri Dao", "Dan Fu"), ("io", "gpu"), "two\nlines")
    assert [str(i) for i in csv_.reference.ids] == ["arxiv:2205.14135"] and csv_.reference.year == 2022
    assert sorted((r.path.rpartition("/")[2], "title" in r.reason) for r in report.remarks) == [
        ("a.ris", True), ("b.json", True), ("b.json", True), ("c.csv", True),
    ]  # fmt: skip


def test_files_that_are_no_bibliography_are_remarks(tmp_path):
    for name, text in (
        ("a.json", "{"),
        ("b.json", "3"),
        ("c.csv", "x,y\n1,2\n"),
        ("d.bib", ""),
        ("e.json", "[" * 100_000),
    ):
        (tmp_path / name).write_text(text)
    with Library() as library:
        report = import_paths(library, sorted(tmp_path.glob("*.*")))
        assert library.count() == (0, 0)
    assert sorted(r.path.rpartition("/")[2] for r in report.remarks) == ["a.json", "b.json", "c.csv", "e.json"]


def test_unknown_format():
    with pytest.raises(UserError, match="did you mean 'bibtex'"):
        formats.write([], "bibtx")


def test_citation_keys_differ():
    entries = [Entry(Reference("Same", authors=("A B",), year=2020)) for _ in range(3)] + [Entry(Reference("日本"))]
    assert formats.bibliography.keys(entries) == ["b2020same", "b2020same-2", "b2020same-3", "entry"]


def test_entries_stand_at_their_lines(tmp_path):
    """Where a format's parser tells lines, entry and remark have theirs; what shares a key is two entries."""
    (tmp_path / "a.bib").write_text(
        '@string{jmlr = "JMLR"}\n\n@article{d,\n  title={One}, journal=jmlr}\n@article{d, title={Two}, journal=jmlr}\n'
        "@misc{untitled, year=2001}\n@misc{nokey\n@misc{last, title={Three}}\n"
    )
    (tmp_path / "b.ris").write_text("\nTY  - JOUR\nTI  - Four\nER  - \n\nTY  - BOOK\nAU  - N\nER  - \n")
    (tmp_path / "c.csv").write_text('Title,Notes\nFive,"a\nb"\nSix,c,surplus\n,d\n')
    with Library() as library:
        report = import_paths(library, [tmp_path / name for name in ("a.bib", "b.ris", "c.csv")])
        found = [(i.entry.title, i.entry.origin.line, i.entry.reference.venue) for i in library.items()]
    assert found == [
        ("One", 3, "JMLR"), ("Two", 5, "JMLR"), ("Three", 8, ""), ("Four", 2, ""), ("Five", 2, ""), ("Six", 4, ""),
    ]  # fmt: skip
    assert sorted((r.path[-5:], r.line, r.reason.partition(":")[0]) for r in report.remarks) == [
        ("a.bib", 6, "untitled has no title"),
        ("a.bib", 7, "BibTeX that cannot be read"),
        ("b.ris", 6, "record 2 has no title"),
        ("c.csv", 4, "more cells than the header has"),
        ("c.csv", 5, "a row without a title"),
    ]
    assert all(r.reason.partition(": ")[2] for r in report.remarks)


def test_what_breaks_the_schema_of_csl_is_read_all_the_same(tmp_path):
    """A year as text, one author as text and keywords as a list: nothing lost, and the items around it come in."""
    items = [{"title": "a"}, {"title": "b", "author": "A One", "issued": "2001", "keyword": ["x", "y"]}]
    items += [{"title": "c", "issued": ["2002"], "author": [{"family": None}, 3]}, {"title": "d", "custom": 1}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    with Library() as library:
        import_paths(library, [tmp_path / "a.json"])
        found = [
            (i.entry.title, i.entry.reference.authors, i.entry.reference.year, i.entry.tags) for i in library.items()
        ]
    assert found == [
        ("a", (), None, ()), ("b", ("A One",), 2001, ("x", "y")), ("c", ("3",), 2002, ()), ("d", (), None, ()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "column, cell, names",
    [
        ("Authors", "Tri Dao, Daniel Y. Fu", ("Tri Dao", "Daniel Y. Fu")),
        ("Authors", "Tri Dao, Dan Fu, A B", ("Tri Dao", "Dan Fu", "A B")),
        ("Authors", "Dao, Tri", ("Tri Dao",)),
        ("Author", "van der Maaten, Laurens J.", ("Laurens J. van der Maaten",)),
        ("Author", "Dao, Tri; Fu, Dan", ("Tri Dao", "Dan Fu")),
    ],
)
def test_names_of_csv(column, cell, names):
    ((entry, _),), _ = formats.bibliography.read_csv(f'Title,{column}\nx,"{cell}"\n')
    assert entry.reference.authors == names


def test_semantic_scholar_writes_arxiv_ids_as_volumes():
    (entry,) = formats.read("@article{x, title={T}, journal={ArXiv}, volume={abs/2503.10622}, year=2025}", "bibtex")
    assert [str(i) for i in entry.reference.ids] == ["arxiv:2503.10622"]
    assert dict(entry.reference.extra)["volume"] == "abs/2503.10622"
