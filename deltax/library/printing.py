"""Entries as lines of text for a terminal."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from deltax.library.importing import Report
from deltax.library.join import Joined
from deltax.library.model import Remark, flat
from deltax.library.sentences import change_of, questions
from deltax.library.store import Item

MARKS = {"": "·", "todo": "☐", "doing": "◐", "hold": "‖", "done": "☑", "cancelled": "☒"}
_PRIORITY = {"highest": "🔺", "high": "⏫", "medium": "🔼", "low": "🔽", "lowest": "⏬"}


def safe(text: str) -> str:
    """Without control characters: a note cannot drive the reader's terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def line(items: list[Item], joined: Joined | None = None) -> str:
    """One work on one line: its first entry's number, read state, title, year, identifier, tags."""
    states = {item.entry.state for item in items}
    state = next((s for s in ("done", "doing", "todo", "hold", "cancelled") if s in states), "")
    best = max((item.entry.title for item in items), key=lambda t: (not t.startswith("http"), len(t)))
    year = next((item.entry.reference.year for item in items if item.entry.reference.year), None)
    ids = list(dict.fromkeys(str(i) for item in items for i in item.entry.reference.ids))
    marks = "".join(dict.fromkeys(_PRIORITY.get(item.entry.task.priority, "") for item in items))
    dues = [item.entry.task.dates.due for item in items if item.entry.task.dates.due and state != "done"]
    parts = [f"{items[0].id:>5} {MARKS[state]} {best}", f"({year})" if year else "", *ids[:2], marks]
    parts += [f"due {min(dues)}" if dues else "", f"{len(items)} notes" if len(items) > 1 else ""]
    parts += ["gone" if all(item.gone or _lost(item) for item in items) else ""]
    parts += [f"= {joined.key}" if joined and joined.how != "likely" else ""]
    return "  ".join(part for part in parts if part)


def _lost(item: Item) -> bool:
    """Whether the file of an entry is no longer there."""
    path = item.entry.origin.path
    return bool(path) and not Path(path).exists()


def full(item: Item, others: list[Item], joined: Joined | None, family: list[str]) -> str:
    """Everything about one entry."""
    entry, ref, dates = item.entry, item.entry.reference, item.entry.task.dates
    out = [f"{item.id}  {ref.title}" + (f"  [{ref.name}]" if ref.name else "")]
    facts = [", ".join(ref.authors), str(ref.year or ""), ref.venue, " ".join(map(str, ref.ids))]
    out += ["   ".join(fact for fact in facts if fact)] if any(facts) else []
    task = [
        f"state {entry.state or 'noted'}",
        f"priority {entry.task.priority}" if entry.task.priority != "normal" else "",
    ]
    task += [f"{key} {value}" for key, value in vars(dates).items() if value]
    out.append("   ".join(part for part in task if part))
    out += ["tags " + " ".join(entry.tags)] if entry.tags else []
    out += (
        [
            entry.origin.path
            + (f":{entry.origin.line}" if entry.origin.line else "")
            + " (no longer there)" * (item.gone or _lost(item))
        ]
        if entry.origin.path
        else []
    )
    out += [f"edited here: {', '.join(sorted(item.edits))}"] if item.edits else []
    if joined:
        sure = f"{joined.how}, {joined.score:g} of 100: dx notes join" if joined.how == "likely" else f"by {joined.how}"
        out.append(f"paper {joined.key} ({sure})")
    out += family
    if found := change_of(entry):
        out.append(f"X: {found.base}   Y: {found.change}")
    out += [f"{link.role}: {link.url}" + (f" ({link.label})" if link.label else "") for link in ref.links]
    out += ["", entry.text] if entry.text else []
    asked = [q.text for q in questions(entry.text) if not q.answered]
    out += ["", "open questions", *(f"  {q}" for q in asked)] if asked else []
    out += ["", "same work", *(line([other]) for other in others)] if others else []
    return "\n".join(out)


def data(item: Item, joined: Joined | None = None) -> dict[str, Any]:
    """An entry as JSON."""
    change = change_of(item.entry)
    origin = item.entry.origin
    return {
        "id": item.id,
        "work": item.work,
        **flat(item.entry),
        "file": origin.path,
        "line": origin.line,
        "end": origin.end,
        "within": origin.within,
        "edited": sorted(item.edits),
        "change": {"base": change.base, "change": change.change} if change else None,
        "questions": [q.text for q in questions(item.entry.text) if not q.answered],
        "paper": {"key": joined.key, "how": joined.how, "score": joined.score} if joined else None,
    }


_FEW = 4
"""Remarks of one kind that are shown line by line; more are counted and told by file and line numbers."""


def _kinds(remarks: list[Remark], everything: bool) -> list[str]:
    """What is in no entry, grouped by kind, the most frequent last."""
    kinds: dict[str, list[Remark]] = {}
    for remark in remarks:
        kinds.setdefault(re.sub(r"\d+|'[^']*'", "N", remark.reason), []).append(remark)
    out, hidden = [], 0
    for members in sorted(kinds.values(), key=len):
        if everything or len(members) <= _FEW:
            for remark in members:
                words = " ".join(remark.text[:300].split())[:60]
                out.append(f"  {remark}" + (f": {words}" if words else ""))
            continue
        lines = sum(max(r.end - r.line + 1, 1) for r in members)
        out.append(f"  {len(members)} times ({lines} lines): {members[0].reason}")
        places: dict[str, list[str]] = {}
        for remark in members:
            span = str(remark.line) if remark.end <= remark.line else f"{remark.line}-{remark.end}"
            places.setdefault(remark.path, []).append(span)
        for path, spans in list(places.items())[:_FEW]:
            out.append(f"    {Path(path).name}:{', '.join(spans[:12])}" + (" ..." if len(spans) > 12 else ""))
        hidden += max(len(places) - _FEW, 0) + sum(len(spans) > 12 for spans in places.values())
    return [*out, "  all of them: --all, or dx notes list --remarks"] if hidden else out


def report(report: Report, dry_run: bool, everything: bool) -> str:
    """The preview of an import: what was found, what changed, which lines are in no entry."""
    read = report.files - report.unchanged_files
    out = [f"{report.files} files: {read} read, {report.unchanged_files} as they were"]
    if not report.files:
        out.append("no Markdown there; a bibliography (.bib .ris .json .csv) is taken in when you name the file itself")
    if report.found:
        counts = dict(report.found)
        out.append(f"{counts.pop('entries')} entries: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    verb = "would be " if dry_run else ""
    changes = (
        ("added", report.added),
        ("updated", report.updated),
        ("removed", report.removed),
        ("unchanged", report.unchanged),
    )
    out.append(", ".join(f"{n} {verb if name != 'unchanged' else ''}{name}" for name, n in changes))
    if report.skipped:
        names = ", ".join(Path(path).name for path in report.skipped[:5])
        more = f" and {len(report.skipped) - 5} more" if len(report.skipped) > 5 else ""
        out.append(f"bibliographies in the folder, not taken in: {names}{more} (name the file itself)")
    if report.remarks:
        lines = sum(max(r.end - r.line + 1, 1) for r in report.remarks)
        out.append(f"{lines} lines in no entry or with a problem (kept word for word):")
        out += _kinds(report.remarks, everything)
    return "\n".join(out)
