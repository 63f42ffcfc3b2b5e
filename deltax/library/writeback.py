"""A reader's edits into the reader's own Markdown file: only the bytes that say something else change."""

import difflib
import os
import re
import tempfile
from pathlib import Path

from deltax.errors import UserError
from deltax.library import tasks
from deltax.library.edits import WRITTEN
from deltax.library.markdown import common_indent
from deltax.library.model import Entry
from deltax.library.store import Item
from deltax.library.tags import slug

_LINES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_BOX = re.compile(r"(?P<before>^[\s>]*(?:[-*+]|\d+[.)])[ \t]+\[)(?P<symbol>.)(?P<after>\])")
_DATES = ("created", "start", "scheduled", "due", "done", "cancelled")


def write(before: Entry, after: Item) -> tuple[str, ...]:
    """Make the file say what the reader edited. `before` is the entry as the file has it. Returns the kinds of edits
    (edits.FIELDS) that the file holds now.

    Raises UserError, with the file untouched, when the file changed since it was imported, or cannot hold the edit.
    """
    path = Path(before.origin.path)
    if not before.origin.path or path.suffix.lower() not in (".md", ".markdown"):
        raise UserError(f"{before.title!r} is in no Markdown file: your edit is kept in the library")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}): your edit is kept in the library") from None
    new = changed(data, before, after.entry)
    if new == data:
        return _writable(before)
    real = Path(os.path.realpath(path))
    try:
        handle, name = tempfile.mkstemp(dir=real.parent, prefix=".deltax-")
        with os.fdopen(handle, "wb") as file:
            file.write(new)
        os.chmod(name, real.stat().st_mode & 0o7777)
        os.replace(name, real)
    except OSError as error:
        raise UserError(f"{path.name} cannot be written ({error.strerror}): your edit is kept in the library") from None
    return _writable(before)


def _writable(entry: Entry) -> tuple[str, ...]:
    return WRITTEN if _BOX.match(entry.origin.raw) else ("text", "notes", "tags+", "tags-")


def changed(data: bytes, before: Entry, after: Entry) -> bytes:
    """The file's bytes with the two entries' difference in state, priority, dates, tags and text, and nothing else."""
    lines = _LINES.findall(data)
    at = before.origin.line - 1
    if at >= len(lines) or _text(lines[at], at) != before.origin.raw:
        same = [n for n, line in enumerate(lines) if _text(line, n) == before.origin.raw]
        if len(same) != 1:
            raise UserError(f"{before.origin.path} changed since it was imported: run dx notes import on it first")
        moved = same[0] - at
    else:
        moved = 0
    if after.text != before.text:
        lines = _body(lines, before, after, moved)
    if before.task != after.task or before.tags != after.tags:
        lines[at + moved] = _line(lines[at + moved], before, after)
    return b"".join(lines)


def _line(raw: bytes, before: Entry, after: Entry) -> bytes:
    text = raw.decode("utf-8", "surrogateescape")
    body = text.rstrip("\r\n")
    end = text[len(body) :]
    trailing = body[len(body.rstrip(" \t\u00a0")) :]
    body = body[: len(body) - len(trailing)]
    where = f"{before.origin.path}:{before.origin.line}"
    box = _BOX.match(body)
    if box is None:
        if before.task != after.task and before.text == after.text and before.tags == after.tags:
            raise UserError(f"{where} has no checkbox: its state and dates are kept in the library only")
        if before.origin.shape == "table" and before.tags != after.tags:
            raise UserError(f"{where} is a row of a table: its tags are kept in the library only")
    elif before.state != after.state:
        body = body[: box.start("symbol")] + after.task.symbol + body[box.end("symbol") :]
    for old, new, marks in _marks(before, after) if box else ():
        body = _replace(body, old, new, marks)
    sections = {slug(part) for part in before.origin.section}
    for tag in (t for t in before.tags if t not in after.tags):
        shorter = re.sub(rf"(?:(?<=\s)|^)#{re.escape(tag)}(?=\s|$)[ \t]?", "", body, count=1).rstrip(" \t")
        if shorter == body:
            reason = "a heading" if tag in sections else "the front matter"
            raise UserError(f"the tag {tag} of {where} comes from {reason}: change it there")
        body = shorter
    for tag in (t for t in after.tags if t not in before.tags):
        body = f"{body} #{tag}"
    return (body + trailing + end).encode("utf-8", "surrogateescape")


def _marks(before: Entry, after: Entry) -> list[tuple[str, str, str]]:
    """(old, new, pattern of the mark) for each field that differs: "" where there is none."""
    found = []
    priorities = {name: mark for mark, name in tasks.PRIORITY_MARKS.items()}
    if before.task.priority != after.task.priority:
        old, new = (priorities.get(entry.task.priority, "") for entry in (before, after))
        found.append((re.escape(old) + "\ufe0f?" if old else "", new, "priority"))
    for key in _DATES:
        old, new = getattr(before.task.dates, key), getattr(after.task.dates, key)
        if old != new:
            marks = [mark for mark, name in tasks.DATE_MARKS.items() if name == key]
            pattern = rf"(?:{'|'.join(marks)})\ufe0f?[ \t\u00a0]*{re.escape(old)}" if old else ""
            found.append((pattern, f"{marks[0]} {new}" if new else "", key))
    return found


def _replace(body: str, pattern: str, new: str, name: str) -> str:
    if not pattern:
        return f"{body} {new}"
    places = list(re.finditer(pattern, body))
    if not places:
        inline = list(re.finditer(rf"[\[(]{'completion' if name == 'done' else name}:: *[^\])]*[\])]", body))
        if not inline:
            raise UserError(f"the {name} of {body.strip()!r} is not written as a mark: change it in the file")
        places = inline
        value = new.split(" ")[-1] if name != "priority" else tasks.PRIORITY_MARKS.get(new, "normal")
        new = f"{places[-1][0].split('::')[0]}:: {value}{places[-1][0][-1]}" if new else ""
    start, end = places[-1].span()
    if not new:
        while start and body[start - 1] in " \t":
            start -= 1
    return body[:start] + new + body[end:]


def _body(lines: list[bytes], before: Entry, after: Entry, moved: int) -> list[bytes]:
    """Nested text, with the lines that are the same left as their bytes are."""
    origin = before.origin
    if origin.shape == "table":
        raise UserError(f"{origin.path}:{origin.line} is a row of a table: change its text in the file")
    start = (origin.body or origin.end + 1) - 1 + moved
    end = origin.end + moved if origin.body else start
    while start < end and not lines[start].strip():
        start += 1
    old = [_text(line, n + start) for n, line in enumerate(lines[start:end])]
    indent = common_indent(old) if old else _nested_indent(_text(lines[origin.line - 1 + moved]), origin.shape)
    seen = [line[len(indent) :] if line.startswith(indent) else "" for line in old]
    written = before.text.split("\n") if before.text else []
    first = len(written) - len(seen)
    if written[max(first, 0) :] != seen or first < 0:
        raise UserError(f"{origin.path} changed since it was imported: run dx notes import on it first")
    wanted = after.text.split("\n") if after.text else []
    if wanted[:first] != written[:first]:
        raise UserError(f"the first line of {origin.path}:{origin.line} is not written back: change it in the file")
    wanted = wanted[first:]
    newline = next((raw[len(raw.rstrip(b"\r\n")) :] for raw in lines if raw.endswith((b"\r", b"\n"))), b"\n")
    out: list[bytes] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, seen, wanted, autojunk=False).get_opcodes():
        if tag == "equal":
            out += lines[start + a : start + b]
        else:
            out += [(indent + line if line else "").encode("utf-8") + newline for line in wanted[c:d]]
    head, tail = lines[:start], lines[end:]
    if out and head and not head[-1].endswith((b"\r", b"\n")):
        head[-1] += newline
    joined = [
        line if line.endswith((b"\r", b"\n")) or n == len(out) - 1 else line + newline for n, line in enumerate(out)
    ]
    if joined and tail and not joined[-1].endswith((b"\r", b"\n")):
        joined[-1] += newline
    if joined and not tail and lines and not lines[-1].endswith((b"\r", b"\n")):
        joined[-1] = joined[-1].rstrip(b"\r\n")
    return [*head, *joined, *tail]


def _nested_indent(title: str, shape: str) -> str:
    if shape in ("heading", "diary", "page", "link"):
        return ""
    lead = title[: len(title) - len(title.lstrip(" \t"))]
    return lead + "\t"


def _text(raw: bytes, number: int = 1) -> str:
    raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw
    return raw.rstrip(b"\r\n").decode("utf-8", "replace").replace("\0", "\ufffd")
