"""The site as files: whole, closed and private."""

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fakes
import pytest

from deltax.errors import UserError
from deltax.library.store import Library
from deltax.site import commands, notes, pages
from deltax.site.build import MARKER, build


class Links(HTMLParser):
    """What a page loads, and where it links to."""

    LOADED = frozenset({("script", "src"), ("link", "href"), ("img", "src"), ("source", "src"), ("iframe", "src")})

    def __init__(self, text):
        super().__init__()
        self.loaded, self.linked, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (tag, name) in self.LOADED:
                self.loaded.append(value)
            elif name in ("href", "src", "action", "data", "srcset", "poster"):
                self.linked.append(value)
            elif name == "id":
                self.ids.add(value)


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    return folder, build(folder, fake)


def test_every_kind_of_page_is_there(built, fake):
    folder, counts = built
    assert counts == {"overviews": 4, "papers": len(fake.papers), "notes": 60, "comparisons": 1}
    assert (folder / "index.html").exists() and (folder / "assets" / "vendor" / "d3.min.js").exists()


def test_every_address_resolves_and_nothing_comes_from_elsewhere(built):
    folder, _ = built
    seen = 0
    for path in folder.rglob("*.html"):
        links = Links(path.read_text())
        for address in [*links.loaded, *links.linked]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                assert address not in links.loaded, f"{path.name} loads {address}"
                assert parts.scheme in ("http", "https", "mailto"), address
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(folder)} -> {address}"
            assert target.is_relative_to(folder.resolve())
            seen += 1
    assert seen > 1000


def test_the_report_lies_beside_its_comparison(built, fake):
    folder, _ = built
    (name,) = fake.runs.comparisons()
    text = (folder / "comparison" / f"{name}.report.html").read_text()
    assert text == pages.report(fake, name) and "Checklist" in text and text.count("<svg") == 4


def test_a_published_comparison_does_not_say_where_its_text_lies(mine, tmp_path):
    secret = tmp_path / "private folder" / "diary.txt"
    record = fakes.comparison()
    record["command"] += f" --data '{secret}'"
    record["rows"][0]["recipe"] = {"make": "m:R", "given": {"task": {"make": "m:T", "given": {"source": str(secret)}}}}
    store = fakes.Store(mine.runs.folder)
    store.remember("comparison", "of a text", record)
    store.close()
    build(tmp_path / "out", mine)
    pages_ = list((tmp_path / "out" / "comparison").iterdir())
    assert len(pages_) == 6 and sum("diary.txt" in path.read_text() for path in pages_) == 3
    assert not any("private folder" in path.read_text() for path in pages_)


def test_style_sheets_load_files_of_the_site(built):
    folder, _ = built
    for path in folder.rglob("*.css"):
        for address in re.findall(r"url\(([^)]*)\)", path.read_text()):
            assert (path.parent / address.strip("'\"")).is_file(), f"{path.name} -> {address}"
        assert "@import" not in path.read_text()


def test_scripts_name_no_address_elsewhere(built):
    """Ours ask for relative addresses; the policy of every page holds for the libraries."""
    folder, _ = built
    for path in (folder / "assets").glob("*.js"):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text()), path.name


def test_a_built_page_cannot_change_anything(built):
    folder, _ = built
    for path in folder.rglob("*.html"):
        text = path.read_text()
        assert "dx-token" not in text and "<textarea" not in text and "Content-Security-Policy" in text


def test_nothing_tells_where_the_reader_keeps_their_files(built, fake):
    folder, _ = built
    home = str(fake.notes.path.parent)
    for path in folder.rglob("*"):
        if path.suffix in (".html", ".json", ".js"):
            assert home not in path.read_text(), path.name


def test_what_is_not_published_is_nowhere(mine, tmp_path):
    private = tmp_path / "private.md"
    private.write_text("---\ndg-publish: false\n---\n- [ ] [Secret plan](https://arxiv.org/abs/1234.56789)\n\t- hush\n")
    with Library(mine.notes.path) as library:
        notes.import_paths(library, [private])
    assert len(mine.notes.items()) == 13
    build(tmp_path / "out", mine)
    for path in (tmp_path / "out").rglob("*.html"):
        assert "Secret plan" not in path.read_text() and "hush" not in path.read_text()


def test_a_note_that_is_no_longer_published_is_removed(mine, tmp_path):
    out = tmp_path / "out"
    build(out, mine)
    assert (out / "note" / "1.html").exists()
    source = tmp_path / "notes" / "list.md"
    source.write_text(source.read_text().replace("dg-publish: true", "dg-publish: false"))
    with Library(mine.notes.path) as library:
        notes.import_paths(library, [source])
    build(out, mine)
    assert not (out / "note" / "1.html").exists() and (out / "index.html").exists()


def test_a_folder_with_other_things_is_left_alone(fake, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        build(tmp_path, fake)
    with pytest.raises(UserError, match="is a file"):
        build(tmp_path / "thesis.tex", fake)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_marker_cannot_make_it_remove_others_files(mine, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    victim.write_text("mine")
    build(out, mine)
    (out / MARKER).write_text(json.dumps({"files": ["../victim.txt"]}))
    build(out, mine)
    assert victim.exists()


def test_the_commands_are_registered(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    commands.add_to(parser.add_subparsers())
    assert parser.parse_args(["serve", "--port", "0", "--open"]).open
    monkeypatch.setattr(commands, "_site", lambda arguments: fakes.site(tmp_path, papers=4, notes=3))
    arguments = parser.parse_args(["site", "build", str(tmp_path / "out")])
    arguments.run(arguments)
    assert "4 papers" in capsys.readouterr().out and Path(tmp_path / "out" / "index.html").exists()
