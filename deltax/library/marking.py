"""Reading a work: what `dx notes read` and the pages do alike."""

from dataclasses import dataclass
from typing import Any

from deltax.library import tasks
from deltax.library.store import Item, Library


@dataclass(frozen=True)
class Mark:
    """The edits that give an entry a read state."""

    item: Item
    edits: dict[str, Any]


def marks(library: Library, item: Item, state: str, day: str) -> list[Mark]:
    """What changes when an entry is marked: read is the whole work, in all its notes; another state is the entry's own.
    A note that was read before keeps its day."""
    members = library.work(item.work) if state == "done" else [item]
    found = []
    for member in members:
        if state == "done" and member.entry.state == "done":
            continue
        task = tasks.with_state(member.entry.task, state, day)
        kept = {"done": task.dates.done, "cancelled": task.dates.cancelled}
        found.append(Mark(member, {"state": state, "dates": kept}))
    return found
