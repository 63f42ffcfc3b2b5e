"""The reader's notes as the pages show them: joined to papers where that is certain, and changed on request."""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from deltax.catalog import Record
from deltax.errors import UserError
from deltax.library import edits, tasks, writeback
from deltax.library.importing import import_paths
from deltax.library.join import Catalogue, certain
from deltax.library.marking import marks
from deltax.library.model import Entry
from deltax.library.store import Item, Library
from deltax.site import prose

STATES = {"": "note", "todo": "to read", "doing": "reading", "hold": "on hold", "done": "read", "cancelled": "dropped"}
_FURTHEST = ("cancelled", "", "todo", "hold", "doing", "done")
EDITABLE = ("state", "priority", "text", "title")


@dataclass
class _View:
    """The notes as the library had them in `state`."""

    state: Any
    items: dict[int, Item] = field(default_factory=dict)
    paper: dict[int, str] = field(default_factory=dict)
    of: dict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    names: dict[str, int] = field(default_factory=dict)


class Notes:
    """All notes of the library at `path`; none where there is no file. May be used from any thread."""

    def __init__(self, path: Path, papers: dict[str, Record]):
        self.path, self.papers = path, papers
        self._seen: _View | None = None

    def items(self) -> list[Item]:
        """In the order of their files."""
        return list(self._view().items.values())

    def item(self, number: int) -> Item:
        """Raises UserError when there is no such note, or it is not shown."""
        found = self._view().items.get(number)
        if found is None:
            raise UserError(f"there is no note {number} here")
        return found

    def paper(self, item: Item) -> str:
        """The key of the item's paper, or ""."""
        return self._view().paper.get(item.work, "")

    def of(self, key: str) -> list[Item]:
        """A paper's notes."""
        return list(self._view().of.get(key, ()))

    def named(self) -> dict[str, int]:
        """{title in lower case: number}, for wiki links."""
        return self._view().names

    def states(self) -> dict[str, str]:
        """{paper: the furthest state of its notes}."""
        return {
            key: max((i.entry.state for i in items), key=lambda state: _FURTHEST.index(state))
            for key, items in self._view().of.items()
        }

    def search(self, query: str, limit: int = 200) -> list[int]:
        """Numbers of the notes that match, best first."""
        shown = self._view().items
        if not shown:
            return []
        with Library(self.path) as library:
            return [item.id for item in library.search(query, limit) if item.id in shown]

    def change(self, number: int, wanted: dict[str, Any]) -> None:
        """Lay the reader's edits over a note. Raises UserError for what is no edit and for a note that is not there."""
        view = self._view()
        with Library(self.path) as library:
            changed = _laid(library, number, wanted)
        if "title" not in wanted:
            for after in changed:
                self._replace(view, after)

    def change_file(self, number: int, wanted: dict[str, Any]) -> None:
        """The same, in the library and in the Markdown file that the note comes from.

        Raises UserError where the file cannot say it; the edit is in the library then.
        """
        with Library(self.path) as library:
            _laid(library, number, wanted)
            after = library.item(number)
            written = writeback.write(library.in_file(number), after)
            import_paths(library, [after.entry.origin.path])
            library.settle(number, written)

    def _replace(self, view: _View, item: Item) -> None:
        """One note anew, where reading all again would make the reader wait."""
        before = view.items.get(item.id)
        if before is None or before.work != item.work:
            return
        of = view.of.get(view.paper.get(item.work, ""), [])
        of[:] = [item if other.id == item.id else other for other in of]
        view.items[item.id] = item
        view.state = _state(self.path)

    def _kept(self, library: Library) -> list[Item]:
        return library.items()

    def _view(self) -> _View:
        state = _state(self.path)
        if self._seen is None or self._seen.state != state:
            view = _View(state)
            if self.path.exists():
                with Library(self.path) as library:
                    items = self._kept(library)
                    pairs = certain(library, Catalogue(self.papers.values()), items)
                view.paper = {work: pair.key for work, pair in pairs.items()}
                for item in items:
                    view.items[item.id] = item
                    view.names.setdefault(item.entry.title.lower(), item.id)
                    if item.work in view.paper:
                        view.of[view.paper[item.work]].append(item)
            self._seen = view
        return self._seen


class Published(Notes):
    """Notes of files whose front matter says `dg-publish: true`, for a site that others read."""

    def _kept(self, library: Library) -> list[Item]:
        public = {path for path, front in library.sources().items() if _published(front)}
        return [item for item in library.items() if item.entry.origin.path in public]


def row(item: Item, paper: str) -> dict[str, Any]:
    """A line of the reading list."""
    entry = item.entry
    return {
        "id": item.id,
        "title": entry.title,
        "name": entry.reference.name,
        "state": entry.state,
        "section": " / ".join(entry.origin.section),
        "date": day(entry).removeprefix("--"),
        "due": entry.task.dates.due,
        "priority": entry.task.priority,
        "tags": list(entry.tags),
        "paper": paper,
        "opening": _opening(entry.text),
    }


def full(item: Item, paper: str, pages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All of a note. `pages`: where the targets of its wiki links are."""
    entry = item.entry
    links = [{"url": prose.link(a.url), "label": a.label or a.url} for a in entry.reference.links if a.role == "own"]
    return {
        **row(item, paper),
        "authors": list(entry.reference.authors),
        "year": entry.reference.year,
        "ids": [str(i) for i in entry.reference.ids],
        "links": list({a["url"]: a for a in links}.values()),
        "dates": {k: v for k, v in vars(entry.task.dates).items() if v},
        "text": entry.text,
        "html": prose.html(entry.text, pages),
        "file": Path(entry.origin.path).name,
        "line": entry.origin.line,
        "edited": sorted(item.edits),
        "gone": item.gone,
    }


def day(entry: Entry) -> str:
    """The day that places a note in time: when it was read, noted or begun."""
    dates = entry.task.dates
    return dates.done or dates.noted or dates.start or dates.created or ""


def _opening(text: str, longest: int = 110) -> str:
    """The first words of a note, without the marks of lists."""
    line = next((found for raw in text.splitlines()[:20] if (found := raw.strip(" \t-*>#"))), "")
    return line if len(line) <= longest else line[:longest].rsplit(" ", 1)[0] + " …"


def _laid(library: Library, number: int, wanted: dict[str, Any]) -> list[Item]:
    """Lay edits over a note; one that is marked read is read in all notes of its work, as `dx notes read` does it."""
    item = library.item(number)
    changed = {number: library.edit(number, _edits(item, wanted))}
    if wanted.get("state") == "done":
        for mark in marks(library, item, "done", date.today().isoformat()):
            changed[mark.item.id] = library.edit(mark.item.id, mark.edits)
    return list(changed.values())


def _edits(item: Item, wanted: dict[str, Any]) -> dict[str, Any]:
    for key, value in wanted.items():
        if key not in EDITABLE or not isinstance(value, str):
            raise UserError(f"a page changes {', '.join(EDITABLE)} of a note, each a text, not {key!r}")
    found: dict[str, Any] = dict(wanted)
    if "text" in found:
        found["text"] = found["text"].replace("\r\n", "\n")
    edits.check(found)
    if "state" in found:
        task = tasks.with_state(item.entry.task, found["state"], date.today().isoformat())
        found["dates"] = {"done": task.dates.done, "cancelled": task.dates.cancelled}
    return found


def _published(front: dict[str, Any]) -> bool:
    return str(front.get("dg-publish", "")).strip().lower() == "true"


def _state(path: Path) -> tuple[Any, ...]:
    """Changes when the library does: its file and its log."""
    found = []
    for name in (path, Path(f"{path}-wal")):
        try:
            stat = os.stat(name)
            found.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return tuple(found)
