"""What to read next: the reader's own priorities and dates, and the genealogy of what was read."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from deltax.library.identifiers import normal_title
from deltax.library.join import Catalogue, Joined, Record
from deltax.library.model import Entry
from deltax.library.sentences import change_of
from deltax.library.store import Item

PRIORITY = {"highest": 4.0, "high": 3.0, "medium": 2.0, "normal": 1.0, "low": 0.5, "lowest": 0.0}


@dataclass(frozen=True)
class Suggestion:
    """A work to read, or a paper of the catalogue that no note speaks of (work 0), with the reasons in words."""

    title: str
    score: float
    reasons: tuple[str, ...]
    work: int = 0
    key: str = ""


@dataclass
class _Work:
    items: list[Item]
    read: bool
    todo: bool
    key: str = ""
    written: bool = False

    @property
    def title(self) -> str:
        return max((item.entry.title for item in self.items), key=lambda t: (not t.startswith("http"), len(t)))


def next_to_read(
    items: Iterable[Item], joined: dict[int, Joined], catalogue: Catalogue, today: date, limit: int = 10
) -> list[Suggestion]:
    """Unread works, best first, then unread X's of what was read that the library lacks.

    A work counts as read when a box of it is ticked, or the reader wrote about it without a box. Score: priority (0 to
    4), a due or scheduled day that has come (3) or comes within a fortnight (1), started (1), 2 for being the X of
    something read, 1 for building on something read.
    """
    works = _works(items, joined)
    parents = _parents(works, catalogue)
    children: dict[str, set[str]] = {}
    for child, above in parents.items():
        for parent in above:
            children.setdefault(parent, set()).add(child)
    node = {_node(number, work): work for number, work in works.items()}
    read = {name for name, work in node.items() if work.read}
    names = {_name(name, node, catalogue) for name, work in node.items() if work.written}
    found = []
    for number, work in works.items():
        if work.read or not work.todo:
            continue
        name = _node(number, work)
        score, reasons = _own(work, today)
        below = sorted(_name(n, node, catalogue) for n in children.get(name, ()) if n in read)
        above = sorted(_name(n, node, catalogue) for n in parents.get(name, ()) if n in read)
        if below:
            score, reasons = score + 2, [*reasons, f"it is the X of {_some(below)}, {_known(below, names)}"]
        if above:
            score, reasons = score + 1, [*reasons, f"it builds on {_some(above)}, {_known(above, names)}"]
        found.append(Suggestion(work.title, score, tuple(reasons), number, work.key))
    for key, record in catalogue.records.items():
        if key not in node:
            below = sorted(_name(n, node, catalogue) for n in children.get(key, ()) if n in read)
            if below:
                known = _known(below, names)
                reasons = (f"it is the X of {_some(below)}, {known}; no note of yours speaks of it",)
                found.append(Suggestion(record.title, 2.0, reasons, 0, key))
    return sorted(found, key=lambda s: (-s.score, s.work == 0, s.work, s.key))[:limit]


def _works(items: Iterable[Item], joined: dict[int, Joined]) -> dict[int, _Work]:
    grouped: dict[int, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.work, []).append(item)
    out = {}
    for number, members in grouped.items():
        states = {item.entry.state for item in members}
        written = "" in states and not states & {"todo", "doing", "hold"}
        pair = joined.get(number)
        key = pair.key if pair and pair.how != "likely" else ""
        read = "done" in states
        out[number] = _Work(members, read or written, bool(states & {"todo", "doing"}), key, written and not read)
    return out


def _own(work: _Work, today: date) -> tuple[float, list[str]]:
    tasks = [item.entry.task for item in work.items if item.entry.state in ("todo", "doing")]
    best = max((task.priority for task in tasks), key=lambda p: PRIORITY[p])
    score, reasons = PRIORITY[best], [f"your priority is {best}"] if best != "normal" else []
    days = [d for task in tasks for d in (task.dates.due, task.dates.scheduled) if d]
    if days:
        left = (date.fromisoformat(min(days)) - today).days
        if left <= 0:
            score, reasons = score + 3, [*reasons, f"it was due on {min(days)}" if left else "it is due today"]
        elif left <= 14:
            score, reasons = score + 1, [*reasons, f"it is due on {min(days)}"]
    if any(task.state == "doing" for task in tasks):
        score, reasons = score + 1, [*reasons, "you started it"]
    return score, reasons


def _parents(works: dict[int, _Work], catalogue: Catalogue) -> dict[str, set[str]]:
    """Node -> its X's: the catalogue's, and those of the reader's own "X but with Y" sentences."""
    out: dict[str, set[str]] = {key: set(record.on) for key, record in catalogue.records.items()}
    by_name: dict[str, str] = {}
    for number, work in works.items():
        for item in work.items:
            for name in _names(item.entry):
                by_name.setdefault(name, _node(number, work))
    for number, work in works.items():
        for item in work.items:
            change = change_of(item.entry)
            base = change and (by_name.get(normal_title(change.base)) or catalogue.named(change.base))
            if base and base != _node(number, work):
                out.setdefault(_node(number, work), set()).add(base)
    return out


def _names(entry: Entry) -> list[str]:
    head = entry.title.partition(":")[0]
    return [normal_title(name) for name in (entry.title, entry.reference.name, head) if len(name) > 2]


def _node(number: int, work: _Work) -> str:
    return work.key or f"#{number}"


def _name(name: str, node: dict[str, _Work], catalogue: Catalogue) -> str:
    record: Record | None = catalogue.records.get(name)
    work = node.get(name)
    short = next((i.entry.reference.name for i in work.items if i.entry.reference.name), "") if work else ""
    return short or (record.title if record else work.title if work else name)


def _known(names: list[str], written: set[str]) -> str:
    """How the reader knows works: "read" is said of what is marked read, not of what has notes alone."""
    return "which you read" if names[0] not in written else "which you have notes on"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
