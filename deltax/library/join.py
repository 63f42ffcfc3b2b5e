"""Works find their paper in the catalogue: by identifier, by title, or by likeness that the reader confirms."""

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from rapidfuzz import fuzz, process

from deltax.library import lines
from deltax.library.identifiers import normal_title
from deltax.library.model import Entry
from deltax.library.store import Item, Library

LIKELY = 88.0
"""Score (0 to 100, rapidfuzz token_set_ratio of normalised words) from which a pair is put to the reader."""


class Record(Protocol):
    """What a catalogue's paper must have; `parents` are the keys of its X's."""

    key: str
    title: str
    arxiv: str | None
    year: int
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """A work and its paper. how: id, title, confirmed, or likely (`score` says how much, and the reader decides)."""

    work: int
    key: str
    how: str
    score: float = 100.0


class Catalogue:
    """Papers by identifier, key and title, built once. Any iterable of objects like Record will do."""

    def __init__(self, records: Iterable[Record] = ()):
        self.records = {record.key: record for record in records}
        self.by_arxiv = {_bare(r.arxiv): r.key for r in self.records.values() if r.arxiv}
        self.by_title: dict[str, str] = {}
        for record in self.records.values():
            self.by_title.setdefault(normal_title(record.title), record.key)
        for record in self.records.values():
            self.by_title.setdefault(normal_title(record.key), record.key)
        for record in self.records.values():
            for name in _called(record):
                self.by_title.setdefault(normal_title(name), record.key)
        self.titles = {record.key: _words(record.title) for record in self.records.values()}
        self.whole = sorted((normal_title(record.title), record.key) for record in self.records.values())

    def certain(self, entry: Entry, own: set[str]) -> tuple[str, str] | None:
        """(key, how) by identifier, else by the whole title, the name, the linked words or the title's head. `own`: the
        arXiv ids of the entry's work; where the catalogue's paper has another one, titles do not join them."""
        for identifier in entry.reference.identity:
            scheme, _, value = identifier.partition(":")
            if scheme == "arxiv" and value in self.by_arxiv:
                return self.by_arxiv[value], "id"
        for title in _titles(entry):
            key = self.by_title.get(normal_title(title)) or self.cut_off(title)
            if key is not None:
                theirs = self.records[key].arxiv
                return None if own and theirs and _bare(theirs) not in own else (key, "title")
        return None

    def named(self, words: str) -> str | None:
        """The paper that a name in a sentence means: its key, its name, its title, or these behind "the" and before
        "paper" or "model"."""
        for text in (
            words,
            re.sub(r"(?i)^(?:the|an?|standard|vanilla|plain|original)\s+|\s+(?:paper|model|v1)$", "", words),
        ):
            key = self.by_title.get(normal_title(text))
            if key is None and len(normal_title(text)) > 4:
                key = self.by_title.get(normal_title(text).removesuffix("s"))
            if key is not None:
                return key
        return None

    def cut_off(self, title: str) -> str | None:
        """The one paper whose title goes on where this one is cut off with dots."""
        match = _CUT.match(title)
        start = normal_title(match[1]) if match else ""
        if len(start) < 20:
            return None
        at = bisect.bisect_left(self.whole, (start, ""))
        found = [key for text, key in self.whole[at : at + 2] if text.startswith(start)]
        return found[0] if len(found) == 1 else None

    def likely(self, entry: Entry, own: set[str]) -> tuple[str, float] | None:
        """The paper whose title is most like the entry's, from LIKELY upwards. Short titles are left alone."""
        words = _words(entry.title)
        if len(words) < 12 or entry.title.startswith("http"):
            return None
        best = process.extractOne(words, self.titles, scorer=fuzz.token_sort_ratio, score_cutoff=LIKELY)
        if best is None:
            return None
        theirs = self.records[best[2]].arxiv
        return None if own and theirs and _bare(theirs) not in own else (best[2], best[1])


def certain(library: Library, catalogue: Catalogue, items: Iterable[Item] | None = None) -> dict[int, Joined]:
    """{work: its paper}, without guesses: what the reader confirmed, then identifiers, then titles."""
    return _join(library, catalogue, items)[0]


def join(library: Library, catalogue: Catalogue, items: Iterable[Item] | None = None) -> dict[int, Joined]:
    """`certain`, and for each other work the paper most like it, for the reader to confirm. Compares every title that
    is left with every paper."""
    found, left = _join(library, catalogue, items)
    for work, (entries, own) in left.items():
        scored = [hit for entry in entries if (hit := catalogue.likely(entry, own))]
        if scored:
            key, score = max(scored, key=lambda hit: hit[1])
            found[work] = Joined(work, key, "likely", round(score, 1))
    return found


def _join(
    library: Library, catalogue: Catalogue, items: Iterable[Item] | None
) -> tuple[dict[int, Joined], dict[int, tuple[list[Entry], set[str]]]]:
    """Works with a certain paper, and the others with their entries and arXiv ids."""
    if not catalogue.records:
        return {}, {}
    rows = library.db.execute("SELECT work, paper, verdict FROM joins")
    verdicts = {name: (paper, verdict) for name, paper, verdict in rows}
    items = library.items() if items is None else list(items)
    own: dict[int, set[str]] = {}
    for item in items:
        own.setdefault(item.work, set()).update(i.value for i in item.entry.reference.ids if i.scheme == "arxiv")
    found: dict[int, Joined] = {}
    left: dict[int, tuple[list[Entry], set[str]]] = {}
    for item in items:
        entry, work = item.entry, item.work
        paper, verdict = next((verdicts[name] for name in names(entry) if name in verdicts), ("", ""))
        if verdict == "yes" and paper in catalogue.records:
            found[work] = Joined(work, paper, "confirmed")
            continue
        sure = catalogue.certain(entry, own[work])
        before = found.get(work)
        if sure and (verdict, paper) != ("no", sure[0]):
            if before is None or (before.how == "title" and sure[1] == "id"):
                found[work] = Joined(work, *sure)
        elif verdict != "no":
            left.setdefault(work, ([], own[work]))[0].append(entry)
    return found, {work: value for work, value in left.items() if work not in found}


def decide(library: Library, item: Item, key: str, yes: bool) -> None:
    """The reader's word on a pair; it holds for the entry's identifiers and title, also after further imports."""
    with library.writing():
        library.db.executemany(
            "INSERT OR REPLACE INTO joins VALUES (?,?,?)",
            [(name, key, "yes" if yes else "no") for name in names(item.entry)],
        )


def names(entry: Entry) -> tuple[str, ...]:
    """What a decision about an entry is remembered under."""
    return (*entry.reference.identity, f"title:{normal_title(entry.title)}")


_CUT = re.compile(r"(.*?)\s*(?:\.\.\.|…)\s*(?:\([^()]*\))?$", re.S)
_ASIDE = re.compile(r"(?s)(.{4,}?)\s*[(\[]([^()\[\]]{1,40})[)\]]$|[(\[]([^()\[\]]{1,40})[)\]]\s*(.{4,})")


def _titles(entry: Entry) -> list[str]:
    own = [k.label for k in entry.reference.links if k.role == "own" and k.label and not lines.is_label(k.label)]
    title = entry.title
    head = title.partition(":")[0] if ":" in title and not title.startswith("http") else ""
    aside = _ASIDE.fullmatch(title)
    less = (aside[1] or aside[4]) if aside else ""
    found = [title, less, entry.reference.name, *(own if len(own) == 1 else ()), head]
    return [t for t in found if len(normal_title(t)) > 2]


def _called(record: Record) -> list[str]:
    """Names of a paper beside its key: the head of its title, where that is one word or two."""
    head = record.title.partition(":")[0]
    named = str(getattr(record, "name", "") or "")
    return [named] * bool(named) + [head] * (head != record.title and len(head.split()) < 3 and len(head) > 2)


def _bare(arxiv: str | None) -> str:
    return (arxiv or "").partition("v")[0]


def _words(title: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in title.casefold()).split())
