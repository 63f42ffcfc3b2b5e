"""A file a paper: described by its front matter, or holding the link of one paper."""

import re
from pathlib import PurePath

from deltax.library import frontmatter, tasks
from deltax.library.frontmatter import FrontMatter
from deltax.library.identifiers import from_fields, from_url, unique
from deltax.library.markdown import LONG, Block, dedent, inline, mentions
from deltax.library.model import Entry, Identifier, Link, Origin, Reference, Task

_URLS = ("url", "link", "source", "paper", "pdf", "openreview")
_USED = {
    *_URLS,
    *("arxiv", "arxiv_id", "arxiv-id", "arxivid", "eprint"),
    "doi",
    "title",
    "authors",
    "author",
    "year",
    "date",
    "venue",
    "journal",
    "tags",
    "tag",
    "status",
}
_STATES = {"done": "done", "read": "done", "finished": "done", "todo": "todo", "unread": "todo", "to read": "todo"}
_STATES |= {"to-read": "todo", "reading": "doing", "in progress": "doing", "in-progress": "doing", "on hold": "hold"}
_STATES |= {"cancelled": "cancelled", "abandoned": "cancelled"}


def described(path: str, lines: list[str], front: FrontMatter, tree: tuple[Block, ...]) -> Entry | None:
    """The entry of a file whose front matter names a paper by id, or by title and authors."""
    values = {key.lower(): value for key, value in front.values.items()}
    ids = _ids(values)
    if ids or (_authors(values) and values.get("title")):
        return _entry(path, lines, front, tree, ids)
    return None


def single_paper(path: str, lines: list[str], front: FrontMatter, tree: tuple[Block, ...]) -> Entry | None:
    """The entry of a file without other entries that links to exactly one paper."""
    ids = unique(from_url(link.url) for link in mentions(lines[front.lines :]))
    return _entry(path, lines, front, tree, ids) if len(ids) == 1 else None


def _entry(
    path: str, lines: list[str], front: FrontMatter, tree: tuple[Block, ...], ids: tuple[Identifier, ...]
) -> Entry:
    values = {key.lower(): value for key, value in front.values.items()}
    top = next((block for block in tree if block.kind == "heading" and block.level == 1), None)
    titled = top is not None and top is tree[0]
    title = str(values.get("title") or (inline(top.content).text if top else "") or PurePath(path).stem)
    body = top.end if titled else front.lines
    start = top.start if titled else min(front.lines, len(lines) - 1)
    urls = list(dict.fromkeys(url for key in _URLS if (url := str(values.get(key, ""))).startswith("http")))
    links = tuple(Link(url) for url in urls)
    links += tuple(link for link in mentions(lines[body:]) if link.url not in urls)
    year = re.search(r"(?:19|20)\d{2}", str(values.get("year") or values.get("date") or ""))
    extra = tuple(
        (key, str(value))
        for key, value in values.items()
        if key not in _USED and not key.startswith("dg-") and isinstance(value, str | int | float)
    )
    reference = Reference(
        title,
        authors=_authors(values),
        year=int(year[0]) if year else None,
        venue=str(values.get("venue") or values.get("journal") or ""),
        ids=ids,
        links=links,
        extra=extra,
    )
    state = _STATES.get(str(values.get("status", "")).casefold().strip(), "")
    task = Task(state, tasks.symbol_of(state) if state else "")
    origin = Origin(path, start + 1, len(lines), body + 1, (), "page", 0, lines[start])
    return Entry(
        reference,
        task,
        frontmatter.tags(front.values),
        dedent([line for line in lines[body:] if len(line) <= LONG]),
        origin,
    )


def _authors(values: dict) -> tuple[str, ...]:
    return frontmatter.strings(values.get("authors", values.get("author")))


def _ids(values: dict) -> tuple[Identifier, ...]:
    return from_fields((key, text) for key, value in values.items() for text in frontmatter.strings(value))
