"""Tables of papers: which column is what, and a row as an entry."""

import re

from deltax.library import tasks
from deltax.library.frontmatter import strings
from deltax.library.identifiers import from_text, from_url, parse, unique
from deltax.library.markdown import inline
from deltax.library.model import PRIORITIES, Dates, Entry, Link, Reference, Task

_NAMES = {
    "title": {"paper title", "title", "paper", "papers", "article", "publication"},
    "name": {"model name", "model", "method", "short name", "name", "acronym"},
    "text": {"summary", "notes", "note", "idea", "tl;dr", "tldr", "comment", "comments", "description", "delta"},
    "link": {"link", "links", "url", "arxiv", "doi", "pdf", "openreview", "id"},
    "year": {"year"},
    "date": {"date", "read on", "added"},
    "authors": {"authors", "author"},
    "venue": {"venue", "journal", "conference"},
    "state": {"status", "state", "read", "read?", "done"},
    "tags": {"tags", "tag", "topic", "topics", "section", "category", "field"},
    "priority": {"priority"},
}
STATES = {"x": "done", "✅": "done", "✓": "done", "yes": "done", "read": "done", "done": "done", "[x]": "done"} | {
    "": "", "-": "", "no": "todo", "unread": "todo", "todo": "todo", "[ ]": "todo", "to read": "todo",
    "reading": "doing", "[/]": "doing",
}  # fmt: skip
_EMPTY = {"", "-", "–", "—", "n/a"}


def columns(header: list[str]) -> list[str] | None:
    """The role of each column, or ":heading" where it has none; None for a table without a title column."""
    roles: list[str] = []
    for cell in header:
        text = inline(cell).text.strip().casefold()
        role = next((role for role, names in _NAMES.items() if text in names and role not in roles), None)
        roles.append(role or f":{inline(cell).text.strip()}")
    if "title" not in roles and "name" in roles:
        roles[roles.index("name")] = "title"
    return roles if "title" in roles else None


def entry(roles: list[str], cells: list[str]) -> tuple[Entry, list[str]] | None:
    """A row's entry and what could not be read in it; None when its title is empty."""
    values = {role: cell.strip() for role, cell in zip(roles, cells, strict=False) if cell.strip() not in _EMPTY}
    shown = inline(values.get("title", ""))
    if not shown.text:
        return None
    problems, dates, state, priority = [], {}, "", "normal"
    links = [*shown.links, *inline(values.get("link", "")).links]
    ids = unique([*(from_url(link.url) for link in links), *from_text(values.get("link", "")), *_bare_ids(values)])
    text = values.get("text", "")
    rest = [f"{role[1:]}: {value}" if role[1:] else value for role, value in values.items() if role.startswith(":")]
    if "state" in values:
        key = values["state"].casefold()
        if key in STATES:
            state = STATES[key]
        else:
            rest.append(f"Status: {values['state']}")
            problems.append(f"status {values['state']!r} is not known: kept in the text")
    if "date" in values:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", values["date"]):
            dates["noted"] = values["date"]
        else:
            rest.append(f"Date: {values['date']}")
    if "priority" in values:
        given = tasks.PRIORITY_MARKS.get(values["priority"].rstrip("\ufe0f"), values["priority"].casefold())
        if given in PRIORITIES:
            priority = given
        else:
            rest.append(f"Priority: {values['priority']}")
            problems.append(f"priority {values['priority']!r} is not known: kept in the text")
    year = re.fullmatch(r"(?:19|20)\d{2}", values.get("year", ""))
    if "year" in values and not year:
        rest.append(f"Year: {values['year']}")
    known = {link.url for link in links}
    links += [Link(k.url, k.label, "mention") for k in inline(text).links if k.url not in known]
    reference = Reference(
        title=shown.text,
        name=inline(values.get("name", "")).text,
        authors=tuple(a.strip() for a in re.split(r";| and |,(?![^(]*\))", values.get("authors", "")) if a.strip()),
        year=int(year[0]) if year else None,
        venue=values.get("venue", ""),
        ids=ids,
        links=tuple(links),
    )
    own = tuple(tag.strip().lstrip("#") for tag in strings(values.get("tags")))
    task = Task(state, tasks.symbol_of(state) if state else "", priority, Dates(**dates))
    return Entry(reference, task, own, "\n".join([*([text] if text else []), *rest])), problems


def _bare_ids(values: dict[str, str]) -> list:
    return [parse(word) for word in re.split(r"[\s,;]+", values.get("link", "")) if word]
