"""The site as files: the pages that the server gives, for a folder that works from `file://` and loads nothing else."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltax.errors import UserError
from deltax.site import pages
from deltax.site.notes import Published
from deltax.site.pages import Site
from deltax.site.render import ASSETS, page
from deltax.site.runs import PublishedRuns

MARKER = "deltax-site.json"


def build(folder: Path | str, site: Site | None = None) -> dict[str, int]:
    """Write every page into `folder` and return how many of each kind. Notes come in from files that say
    `dg-publish: true` only.

    Raises UserError for a folder that holds something else.
    """
    folder, site = Path(folder), site or Site()
    public = public_site(site)
    _check(folder)
    counts: dict[str, int] = {}
    written = {MARKER}
    public.trees.prepare()
    for name, text in files(public):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.add(name)
        if name.endswith(".html") and not name.endswith(".report.html"):
            kind = f"{name.partition('/')[0]}s" if "/" in name else "overviews"
            counts[kind] = counts.get(kind, 0) + 1
    for name, source in copies(public):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        written.add(name)
    _tidy(folder, written)
    return counts


def public_site(site: Site) -> Site:
    """The site without what the reader does not publish."""
    notes = Published(site.notes.path, dict(site.papers))
    return replace(site, notes=notes, runs=PublishedRuns(site.runs.folder))


def files(site: Site) -> Iterator[tuple[str, str]]:
    """(address, HTML or JSON) of every page."""
    yield "index.html", page("genealogy.html", pages.genealogy(site))
    yield "comparisons.html", page("comparisons.html", pages.comparisons(site) | {"live": None})
    yield "compose.html", page("compose.html", pages.compositions(site))
    yield "library.html", page("library.html", pages.library(site))
    for key in site.papers:
        yield f"paper/{key}.html", page("paper.html", pages.paper(site, key), root="../")
    for item in site.notes.items():
        yield f"note/{item.id}.html", page("note.html", pages.note(site, item.id), root="../")
    for name, found in site.runs.comparisons().items():
        yield f"comparison/{name}.html", page("comparison.html", pages.comparison(site, name), root="../")
        yield f"comparison/{name}.json", json.dumps(found, indent=1)
        if report := site.reports.of(found):
            yield f"comparison/{name}.report.html", report


def copies(site: Site) -> Iterator[tuple[str, Path]]:
    """(address, file) of what pages load."""
    for path in sorted(ASSETS.rglob("*")):
        if path.is_file():
            yield f"assets/{path.relative_to(ASSETS).as_posix()}", path
    for key in site.papers:
        for figure in pages.figures(site, key, site.stored(key)):
            source = pages.figure(site, figure["file"])
            if source:
                yield f"evidence/{figure['file']}", source


def _check(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the site")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"{folder} holds other things: name a new folder, or one that 'dx site build' made")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARKER).exists():
            (folder / MARKER).write_text(json.dumps({"files": []}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from None


def _tidy(folder: Path, written: set[str]) -> None:
    """Remove what an earlier build wrote and this one did not: a note that is no longer published must go."""
    marker = folder / MARKER
    before: Any = json.loads(marker.read_text(encoding="utf-8"))["files"] if marker.exists() else []
    for name in set(before) - written:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)
    marker.write_text(json.dumps({"files": sorted(written)}), encoding="utf-8")
