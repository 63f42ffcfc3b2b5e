"""What the pages are given to show."""

import json

import fakes
import pytest

from deltax import catalog
from deltax.errors import UserError
from deltax.library.store import Library
from deltax.site import notes, pages
from deltax.site.trees import Trees, chain


def test_the_front_page_has_every_paper_and_every_step(fake):
    found = pages.genealogy(fake)
    assert [p["key"] for p in found["papers"]] == list(fake.papers)
    assert found["edges"] == sum(len(p["parents"]) for p in found["papers"]) > len(fake.papers) - 2
    assert all(fake.papers[parent].year <= p["year"] for p in found["papers"] for parent in p["parents"])
    json.dumps(found)


def test_a_paper_knows_its_relatives_its_evidence_and_its_notes(fake):
    key = next(iter(fake.papers))
    found = pages.paper(fake, key)
    assert {p["key"] for p in found["children"]} == {k for k, r in fake.papers.items() if key in r.on}
    assert found["descendants"] >= len(found["children"]) > 0 and found["ancestors"] == 0
    measured = found["claims"][-1]
    assert (measured["mark"], measured["low"], measured["high"]) == ("supported", -0.03, -0.009)
    assert measured["command"] == f"dx verify {key} --claim better"
    assert found["figures"] == [{"caption": "Loss over steps", "file": f"figures/{key}.svg"}]
    assert found["speed"][0]["summary"].startswith("1.4")
    assert any("scales like" in n["text"] for n in found["notes"])
    assert "twice_is_twice" not in found["code"] and '<span class="k">class' in found["code"]


def test_the_real_catalogue_has_its_pages():
    site = pages.Site()
    for key in ("gpt", "dyt"):
        found = pages.paper(site, key)
        assert found["sentence"] == catalog.find(key).sentence and found["claims"]


@pytest.mark.parametrize(
    ("outcomes", "is_"),
    [
        ([], "checked"),
        (["not testable here"], "checked"),
        (["supported at this scale", "inconclusive"], "supported"),
        (["supported at this scale", "opposite at this scale"], "mixed"),
        (["opposite at this scale", "not seen at this scale"], "opposite"),
        (["not seen at this scale"], "unclear"),
        (["a word of a later version"], "unclear"),
    ],
)
def test_how_a_paper_stands(fake, outcomes, is_):
    record = next(iter(fake.papers.values()))
    stored = {"measured": {str(i): {"outcome": o} for i, o in enumerate(outcomes)}}
    assert pages.standing(record, stored) == is_


def test_an_unknown_paper_is_named_with_its_nearest(fake):
    key = list(fake.papers)[5]
    with pytest.raises(UserError, match=f"did you mean '{key}'"):
        pages.paper(fake, key + "x")


def test_figures_come_from_the_evidence_folder_only(fake, tmp_path):
    (tmp_path / "secret.svg").write_text("<svg/>")
    outside = f"../{tmp_path.name}/secret.svg"
    assert pages.figure(fake, outside) is None and pages.figure(fake, str(tmp_path / "secret.svg")) is None
    stored = {"measured": {"a": {"figures": {"x": outside, "y": "<svg/>"}}}}
    assert pages.figures(fake, "no-such", stored) == []


def test_evidence_that_is_not_json_is_said(fake, tmp_path):
    site = fakes.Site(papers=fake.papers, notes=fake.notes, runs=fake.runs, trees=fake.trees, evidence=tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="dx verify x"):
        site.stored("x")


def test_notes_are_joined_to_papers_and_say_what_was_read(mine):
    key = mine.notes.paper(mine.notes.items()[0])
    assert key == next(iter(mine.papers))
    number = mine.notes.items()[0].id
    mine.notes.change(number, {"state": "done"})
    assert mine.notes.states()[key] == "done" and mine.notes.item(number).entry.task.dates.done
    assert pages.genealogy(mine)["papers"][0]["read"] == "done"


def test_an_edit_shows_at_once_and_so_does_one_from_elsewhere(mine):
    before = mine.notes._view()
    mine.notes.change(3, {"text": "by the page"})
    assert mine.notes._view() is before and mine.notes.item(3).entry.text == "by the page"
    with Library(mine.notes.path) as library:
        library.edit(3, {"text": "by the shell"})
    assert mine.notes.item(3).entry.text == "by the shell"
    key = mine.notes.paper(mine.notes.item(1))
    mine.notes.change(1, {"state": "done"})
    assert [i.entry.state for i in mine.notes.of(key)] == ["done"]


def test_the_library_counts_its_states(fake):
    found = pages.library(fake)
    assert len(found["rows"]) == 60 == sum(found["counts"].values())
    assert found["sections"] == ["section 0", "section 1"]
    assert found["rows"][0]["opening"].startswith("it scales")


def test_only_a_file_that_says_so_is_published(mine, tmp_path):
    published = notes.Published(mine.notes.path, mine.papers)
    assert len(published.items()) == 12
    for word in ("false", "maybe", ""):
        fakes.library(tmp_path / "p.sqlite", tmp_path / "p", 12, mine.papers, public=word)
        assert notes.Published(tmp_path / "p.sqlite", mine.papers).items() == []
        assert len(notes.Notes(tmp_path / "p.sqlite", mine.papers).items()) == 12


def test_without_a_library_and_a_store_there_are_pages(tmp_path):
    site = pages.Site(
        papers=catalog.papers(),
        notes=notes.Notes(tmp_path / "none.sqlite", catalog.papers()),
        runs=fakes.Runs(tmp_path / "none"),
    )
    assert pages.library(site)["rows"] == [] and pages.comparisons(site)["comparisons"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [{"ids": "x"}, {"state": 3}, {"state": "gone"}, {"text": None}, {"tags+": "a"}])
def test_an_edit_that_is_none_is_refused(mine, wanted):
    with pytest.raises(UserError):
        mine.notes.change(1, wanted)


def test_a_comparison_has_its_axes(fake):
    (name, stored), *_ = fake.runs.comparisons().items()
    found = pages.comparison(fake, name)
    row = found["rows"][0]
    assert row["scale"] == {
        "tokens": 1.0, "seconds": 1 / stored["rows"][0]["tokens_per_second"], "FLOPs": 1.6e12 / 600_000,
    }  # fmt: skip
    assert found["rows"][1]["bytes"] == 35_000_000
    with pytest.raises(UserError, match="no comparison 'x'"):
        pages.comparison(fake, "x")


def test_what_runs_now_says_how_far_it_is(mine):
    fakes.train(mine.runs.folder, "gpt+dyt", 3, 150, 2.5)
    (arm,) = mine.runs.live()["arms"]
    assert arm["title"] == "gpt+dyt"
    (run,) = arm["runs"]
    assert (run["step"], run["steps"], run["loss"], run["speed"]) == (150, 300, 2.5, 18_000.0)


def test_what_runs_now_is_told_by_comparison(mine):
    store = fakes.Store(mine.runs.folder)
    for title, seed, steps in (("gpt", 1, 300), ("gpt+dyt", 1, 300), ("gpt", 1, 700), ("gpt+rope", 1, 300)):
        fakes.train(mine.runs.folder, title, seed, 150, 2.5, steps)
    with (
        store.announced("comparing", fakes.announcement("a", "gpt", "gpt+dyt")),
        store.announced("comparing", fakes.announcement("b", "gpt", "gpt+alibi", steps=700)),
    ):
        a, b = mine.runs.live()["plans"]
        assert (a["plan"], a["title"]) == ("a", "gpt · gpt+dyt") and (b["plan"], b["title"]) == ("b", "gpt · gpt+alibi")
        assert [[r["id"] for r in arm["runs"]] for arm in a["arms"]] == [["gpt-1"], ["gpt+dyt-1"]]
        assert [[r["id"] for r in arm["runs"]] for arm in b["arms"]] == [["gpt-1-700"], []]
        assert [arm["title"] for arm in mine.runs.live()["arms"]] == ["gpt+rope"]
    assert mine.runs.live()["plans"] == [] and len(mine.runs.live()["arms"]) == 3
    store.close()


def test_the_chain_to_a_paper_starts_with_a_whole_recipe():
    papers = catalog.papers()
    assert chain("dyt", papers) == ["gpt", "dyt"] and chain("rms-norm", papers)[0] == "gpt"
    procedure = next(key for key, r in papers.items() if r.kind == "procedure")
    assert chain(procedure, papers) is None


def test_trees_answer_from_another_process_and_remember(tmp_path):
    trees = Trees(tmp_path)
    assert trees.cached("dyt") is None and trees.cached_compositions() is None
    procedure = next(key for key, r in catalog.papers().items() if r.kind == "procedure")
    found = trees.diffs(["dyt", procedure])
    assert {"path": "model.norm", "a": "LayerNorm()", "b": "DyT()"} in found["dyt"]["diff"]
    assert found["dyt"]["command"] == "dx diff gpt gpt+dyt" and "missing" in found[procedure]
    assert Trees(tmp_path).cached("dyt") == found["dyt"]


def test_which_deltas_compose_is_told_by_their_trees(tmp_path):
    few = {key: catalog.find(key) for key in ("gpt", "dyt", "rms-norm", "rope", "rope-3d")}
    found = Trees(tmp_path, few).compositions()
    pairs = {frozenset(pair.split()): outcome for pair, outcome in found["pairs"].items()}
    assert pairs[frozenset(("rope", "dyt"))] == "commutes"
    assert pairs[frozenset(("rms-norm", "dyt"))] == "excludes"
    assert pairs[frozenset(("rope", "rope-3d"))] == "replaces" and found["orders"] == {"rope rope-3d": "forward"}
    assert any("erases" in reason for reason in found["reasons"].values())
    assert len(pairs) == 6


def test_a_changed_paper_costs_its_own_trees_alone(tmp_path):
    records = fakes.catalogue(tmp_path / "papers", 12)
    keys = [key for key, r in records.items() if r.kind == "delta"]
    asked = []

    class Noted(Trees):
        def _ask(self, request):
            asked.append(request)
            table = request["compose"]
            pairs = {f"{a} {b}": "commutes" for i, a in enumerate(keys) for b in keys[i + 1 :]}
            return {
                "compose": {"base": "gpt", "keys": keys, "pairs": pairs, "orders": {}, "reasons": {}, **table["known"]}
                | {"pairs": pairs}
            }

    first = Noted(tmp_path / "cache", records).compositions()
    assert asked[-1]["compose"]["known"]["pairs"] == {}
    assert Noted(tmp_path / "cache", records).compositions() == first and len(asked) == 1
    last = records[keys[-1]]
    assert not any(last.key in r.imports for r in records.values())
    last.path.write_text(last.source.replace("scale = 2.0", "scale = 3.0"))
    Noted(tmp_path / "cache", records).compositions()
    known = asked[-1]["compose"]["known"]["pairs"]
    assert known.keys() == {pair for pair in first["pairs"] if last.key not in pair.split()}
    oldest = records[keys[0]]
    oldest.path.write_text(oldest.source + "\nNEW = 1\n")
    Noted(tmp_path / "cache", records).compositions()
    assert asked[-1]["compose"]["known"]["pairs"] == {}, "all of these descend from the oldest"


def test_known_pairs_are_not_tried_again():
    from deltax.site.trees import _compose

    known = {"pairs": {"rope dyt": "excludes"}, "orders": {}, "reasons": {"rope dyt": "so it was told"}}
    found = _compose(["rope", "dyt", "rms-norm"], known)
    assert found["pairs"]["rope dyt"] == "excludes" and found["reasons"]["rope dyt"] == "so it was told"
    assert found["pairs"]["rope rms-norm"] == "commutes" and len(found["pairs"]) == 3
