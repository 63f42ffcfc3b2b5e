"""Tables of papers: whether a table is one, which column is what, and a row as an entry."""

import re

from deltax.library import lines, names, tasks
from deltax.library.frontmatter import strings
from deltax.library.identifiers import from_text, from_url, parse, unique, year_of
from deltax.library.markdown import inline
from deltax.library.model import PRIORITIES, Dates, Entry, Link, Reference, Task

_NAMES = {
    "title": (
        *("paper title", "title", "titles", "paper name", "paper", "papers", "article", "article title", "publication"),
        *("publications", "work", "reference", "paper link", "title link", "papers titles", "论文", "标题"),
    ),
    "name": (
        "model name",
        "model",
        "method",
        "short name",
        "name",
        "acronym",
        "abbreviation",
        "abbr",
        "alias",
        "approach",
    ),
    "text": (
        *(
            "summary",
            "notes",
            "note",
            "idea",
            "tl dr",
            "tldr",
            "comment",
            "comments",
            "description",
            "delta",
            "my notes",
        ),
        *(
            "takeaway",
            "takeaways",
            "key idea",
            "key points",
            "contribution",
            "contributions",
            "highlights",
            "remarks",
            "gist",
        ),
    ),
    "link": (
        *(
            "link",
            "links",
            "url",
            "urls",
            "arxiv",
            "doi",
            "pdf",
            "openreview",
            "id",
            "paper url",
            "resources",
            "resource",
        ),
        *("paper pdf", "source", "download", "arxiv id", "paper id", "code", "github", "project", "website", "repo"),
    ),
    "year": ("year", "pub year", "published year"),
    "date": (
        "date",
        "read on",
        "added",
        "date read",
        "published",
        "publication date",
        "when",
        "pub date",
        "release date",
    ),
    "authors": ("authors", "author", "author s", "by", "first author"),
    "venue": ("venue", "journal", "conference", "published in", "venue year", "conf", "pub", "published at"),
    "state": ("status", "state", "read", "read it", "done"),
    "tags": (
        "tags",
        "tag",
        "topic",
        "topics",
        "section",
        "category",
        "categories",
        "field",
        "keywords",
        "area",
        "type",
    ),
    "priority": ("priority",),
}
STATES = {"x": "done", "✅": "done", "✓": "done", "✔": "done", "☑": "done", "yes": "done", "read": "done"} | {
    "done": "done", "[x]": "done", "finished": "done", "completed": "done", "complete": "done", "y": "done",
    "": "", "-": "", "no": "todo", "unread": "todo", "todo": "todo", "[ ]": "todo", "to read": "todo",
    "to-read": "todo",
    "toread": "todo", "not started": "todo", "not read": "todo", "n": "todo", "❌": "todo", "☐": "todo",
    "queued": "todo",
    "backlog": "todo", "later": "todo", "next": "todo", "want to read": "todo",
    "reading": "doing", "[/]": "doing", "in progress": "doing", "in-progress": "doing", "doing": "doing",
    "started": "doing",
    "now": "doing", "currently reading": "doing", "on hold": "hold", "paused": "hold", "waiting": "hold",
    "cancelled": "cancelled", "canceled": "cancelled", "abandoned": "cancelled", "dropped": "cancelled",
    "skipped": "cancelled",
}  # fmt: skip
"""Read states in the words of tables, properties, headings and CSV files."""

_EMPTY = {"", "-", "–", "—", "n/a", "none"}


def columns(header: list[str]) -> list[str] | None:
    """The role of each column, or ":heading" where it has none; None for a table without a title column."""
    shown = [inline(cell).text.strip() for cell in header]
    words = [" ".join(re.sub(r"[^\w]+", " ", text.casefold()).split()) for text in shown]
    roles: list[str] = [f":{text}" for text in shown]
    for role, known in _NAMES.items():
        found = [n for name in known for n, text in enumerate(words) if text == name and roles[n].startswith(":")]
        for n in found if role == "link" else found[:1]:
            roles[n] = role
    if "title" in roles:  # a column "Paper" beside a column "Title" holds the links
        for n, text in enumerate(words):
            if roles[n].startswith(":") and text in ("paper", "papers", "publication", "article", "paper link"):
                roles[n] = "link"
    elif "name" in roles:
        roles[roles.index("name")] = "title"
    return roles if "title" in roles else None


def guessed(rows: list[list[str]]) -> list[str] | None:
    """Roles of a table whose head names none, by its cells: the column whose cells hold the titles of papers."""
    if not rows:
        return None
    best, score = None, 0.0
    for n in range(len(rows[0])):
        cells = [row[n] for row in rows if n < len(row)]
        heads = [lines.parse(inline(cell)) for cell in cells]
        good = sum(lines.is_title(head.title) and not lines.is_label(head.title) for head in heads) / max(len(cells), 1)
        if good > score:
            best, score = n, good
    if best is None or score < 0.5 or not papers(rows, best):
        return None
    return ["title" if n == best else "link" if _links(rows, n) else ":" for n in range(len(rows[0]))]


def _links(rows: list[list[str]], column: int) -> bool:
    cells = [row[column] for row in rows if column < len(row) and row[column].strip() not in _EMPTY]
    return bool(cells) and sum("](" in cell or "://" in cell for cell in cells) > len(cells) / 2


def papers(rows: list[list[str]], title: int) -> bool:
    """Whether the rows of a table are papers: at least a third of them link to one or name one."""
    found = 0
    for row in rows:
        text = " ".join(row)
        links = inline(text).links if "](" in text or "://" in text or "<a" in text else ()
        found += any(lines.leads_to_paper(link.url, link.label) for link in links) or bool(from_text(text))
    return found * 3 >= len(rows) and found > 0


def listed(roles: list[str], named: str, rows: list[list[str]]) -> bool:
    """Whether a table with these roles lists papers. `named` is the head of its title column: a column that says it
    holds papers is taken at its word unless its rows are measurements, a column of models or methods is not."""
    title = roles.index("title")
    word = " ".join(re.sub(r"[^\w]+", " ", named.casefold()).split())
    cells = [c.strip() for row in rows for n, c in enumerate(row) if n != title and c.strip() not in _EMPTY]
    numbers = sum(
        bool(re.fullmatch(r"[*_~ ]*[-+±~<>≈]?\d[\d.,]*\s*(?:%|[kKmMbB]|±\s*[\d.]+)?[*_ ]*", c)) for c in cells
    )
    years = sum(bool(re.fullmatch(r"(?:19|20)\d{2}", c)) for c in cells)
    if word in _NAMES["name"]:
        return papers(rows, title) and numbers - years <= len(cells) * 0.4
    if papers(rows, title):
        return True
    known = sum(role in ("authors", "venue", "year", "text", "state", "name", "link") for role in roles)
    return bool(known or word.endswith(("title", "titles"))) and numbers - years <= len(cells) * 0.5


def entry(roles: list[str], cells: list[str], exported: str | None = None) -> tuple[Entry, list[str]] | None:
    """A row's entry and what could not be read in it; None when its title is empty. `exported`: what rides along in a
    row that Δx wrote, whose title is one whatever it looks like."""
    values: dict[str, str] = {}
    for role, cell in zip(roles, cells, strict=False):
        if cell.strip() not in _EMPTY:
            values[role] = f"{values[role]} {cell.strip()}" if role in values else cell.strip()
    shown = inline(values.get("title", ""))
    head = lines.parse(shown) if shown.text else None
    name = inline(values.get("name", "")).text
    if head is None or (lines.is_label(head.title) and head.style == "link" and exported is None):
        if head is None or not name:
            return None
        head.title = name
    problems, dates, state, priority = [], {}, "", "normal"
    given = [link for link in inline(values.get("link", "")).links if link.url]
    links = [link for link in [*head.links, *given] if link.url]
    links = list({link.url: link for link in reversed(links)}.values())[::-1]
    ids = unique(
        [
            *(from_url(link.url) for link in links),
            *from_text(values.get("link", "")),
            *_bare_ids(values),
            *from_text(shown.text),
        ]
    )
    text = values.get("text", "")
    rest = [f"{role[1:]}: {value}" if role[1:] else value for role, value in values.items() if role.startswith(":")]
    if "state" in values:
        key = values["state"].casefold().rstrip("\ufe0f")
        if key in STATES:
            state = STATES[key]
        else:
            rest.append(f"Status: {values['state']}")
            problems.append(f"status {values['state']!r} is not known: kept in the text")
    year = re.fullmatch(r"(?:19|20)\d{2}", values.get("year", ""))
    year_ = int(year[0]) if year else head.year
    if "date" in values:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", values["date"]):
            dates["noted"] = values["date"]
        else:
            rest.append(f"Date: {values['date']}")
            year_ = year_ or lines._any_year(values["date"])
    if "priority" in values:
        mark = tasks.PRIORITY_MARKS.get(values["priority"].rstrip("\ufe0f"), values["priority"].casefold())
        if mark in PRIORITIES:
            priority = mark
        else:
            rest.append(f"Priority: {values['priority']}")
            problems.append(f"priority {values['priority']!r} is not known: kept in the text")
    if "year" in values and not year:
        rest.append(f"Year: {values['year']}")
    venue = inline(values.get("venue", "")).text or head.venue
    known = {link.url for link in links}
    links += [Link(k.url, k.label, "mention") for k in inline(text).links if k.url not in known]
    links += [Link(k.url, k.label, "mention") for k in head.mentions if k.url not in known]
    reference = Reference(
        title=head.title,
        name=name or head.name,
        authors=names.people(inline(values["authors"]).text) if "authors" in values else head.authors,
        year=year_ or lines._any_year(venue) or year_of(ids),
        venue=venue,
        ids=ids,
        links=tuple(links),
    )
    own = tuple(tag.strip().lstrip("#") for tag in strings(inline(values.get("tags", "")).text))
    task = Task(state, tasks.symbol_of(state) if state else "", priority, Dates(**dates))
    body = [part for part in (head.summary, text, *rest) if part]
    return Entry(reference, task, own, "\n".join(body)), problems


def _bare_ids(values: dict[str, str]) -> list:
    return [parse(word) for word in re.split(r"[\s,;]+", values.get("link", "")) if word]
