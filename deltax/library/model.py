"""What a reader wrote about a paper, as plain values."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from deltax.library import names as names_

STATES = ("", "todo", "doing", "hold", "done", "cancelled")
"""Read state. "" is a note without a checkbox: the reader wrote about it and said nothing of having read it."""

PRIORITIES = ("highest", "high", "medium", "normal", "low", "lowest")
"""In Obsidian Tasks' order: an entry without a mark is normal, between medium and low."""


@dataclass(frozen=True)
class Identifier:
    """A name that a registry gave: scheme arxiv, openreview or doi. `version` ("v2") does not tell papers apart."""

    scheme: str
    value: str
    version: str = ""

    @property
    def key(self) -> str:
        """What makes two identifiers the same paper: no version, and no subject class of an old arXiv id."""
        value = self.value
        if self.scheme == "arxiv" and "/" in value:
            value = value.partition("/")[0].partition(".")[0] + "/" + value.partition("/")[2]
        return f"{self.scheme}:{value}"

    def __str__(self) -> str:
        return f"{self.scheme}:{self.value}{self.version}"


@dataclass(frozen=True)
class Link:
    """Where a note points. role: own (the thing itself), mention (in the nested text), wiki or embed (another note)."""

    url: str
    label: str = ""
    role: str = "own"


@dataclass(frozen=True)
class Dates:
    """ISO dates as text, "" when absent. `noted` is a diary's heading; without a year it is `--MM-DD`."""

    created: str = ""
    start: str = ""
    scheduled: str = ""
    due: str = ""
    done: str = ""
    cancelled: str = ""
    noted: str = ""


@dataclass(frozen=True)
class Task:
    """The checkbox and its fields. `symbol` is the character in the box; `fields` holds recurrence, ids and what else
    stood in Tasks or Dataview marks, as (key, value) pairs in the order written."""

    state: str = ""
    symbol: str = ""
    priority: str = "normal"
    dates: Dates = Dates()
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reference:
    """What is read. `name` is the model's, where the note gives one; an author is a text, or a Name with its parts;
    `extra` keeps bibliography fields as they came."""

    title: str
    name: str = ""
    authors: tuple[str, ...] = ()
    year: int | None = None
    venue: str = ""
    ids: tuple[Identifier, ...] = ()
    links: tuple[Link, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def identity(self) -> tuple[str, ...]:
        """Keys under which this is one paper; empty when the line names several papers of one scheme."""
        schemes = [i.scheme for i in self.ids]
        return tuple(i.key for i in self.ids) if len(set(schemes)) == len(schemes) else ()


@dataclass(frozen=True)
class Origin:
    """Where an entry stands: lines count from 1, `end` is its last line, `body` the first line of its nested text (0:
    none), `within` the line of the entry that holds it (0: none), `raw` its first line as written."""

    path: str = ""
    line: int = 0
    end: int = 0
    body: int = 0
    section: tuple[str, ...] = ()
    shape: str = ""
    within: int = 0
    raw: str = ""


@dataclass(frozen=True)
class Entry:
    """One note on one thing. `text` is what the reader wrote under or beside it, verbatim, less its common indent."""

    reference: Reference
    task: Task = Task()
    tags: tuple[str, ...] = ()
    text: str = ""
    origin: Origin = Origin()

    @property
    def title(self) -> str:
        return self.reference.title

    @property
    def state(self) -> str:
        return self.task.state


@dataclass(frozen=True)
class Remark:
    """Lines that are in no entry: kept verbatim in `text`, with the reason."""

    path: str
    line: int
    end: int
    reason: str
    text: str = ""

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else self.path
        return f"{where}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """All that one file gave. Every line with text lies in an entry, a heading, the front matter or a remark."""

    path: str
    entries: tuple[Entry, ...] = ()
    remarks: tuple[Remark, ...] = ()
    front: dict[str, Any] = field(default_factory=dict)


FIELDS = (
    *("title", "name", "authors", "names", "year", "venue", "ids", "links", "extra"),
    *("state", "symbol", "priority", "dates", "fields", "tags", "text", "section"),
)
"""Everything an entry says, apart from the place where it says it."""


def flat(entry: Entry) -> dict[str, Any]:
    """FIELDS of an entry as JSON values: what two entries must share to say the same."""
    ref, task = entry.reference, entry.task
    return {
        "title": ref.title,
        "name": ref.name,
        "authors": [str(author) for author in ref.authors],
        "names": names_.structured(ref.authors),
        "year": ref.year,
        "venue": ref.venue,
        "ids": [[i.scheme, i.value, i.version] for i in ref.ids],
        "links": [[link.url, link.label, link.role] for link in ref.links],
        "extra": [list(pair) for pair in ref.extra],
        "state": task.state,
        "symbol": task.symbol,
        "priority": task.priority,
        "dates": {key: value for key, value in vars(task.dates).items() if value},
        "fields": [list(pair) for pair in task.fields],
        "tags": list(entry.tags),
        "text": entry.text,
        "section": list(entry.origin.section),
    }


def unflat(values: dict[str, Any], origin: Origin = Origin()) -> Entry:
    """The entry that `flat` gave these values; what is missing takes its default. `origin` supplies the place."""
    known = {f.name for f in fields(Dates)}
    reference = Reference(
        title=values["title"],
        name=values.get("name", ""),
        authors=names_.restored(tuple(values.get("authors", ())), values.get("names", [])),
        year=values.get("year"),
        venue=values.get("venue", ""),
        ids=tuple(Identifier(*i) for i in values.get("ids", ())),
        links=tuple(Link(*link) for link in values.get("links", ())),
        extra=tuple((k, v) for k, v in values.get("extra", ())),
    )
    task = Task(
        state=values.get("state", ""),
        symbol=values.get("symbol", ""),
        priority=values.get("priority", "normal"),
        dates=Dates(**{k: v for k, v in values.get("dates", {}).items() if k in known}),
        fields=tuple((k, v) for k, v in values.get("fields", ())),
    )
    origin = replace(origin, section=tuple(values.get("section", origin.section)))
    return Entry(reference, task, tuple(values.get("tags", ())), values.get("text", ""), origin)
