"""A reader's edits into the reader's own Markdown file: only the bytes that say something else change."""

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path

from deltax.errors import UserError
from deltax.library import tasks
from deltax.library.edits import WRITTEN
from deltax.library.markdown import common_indent
from deltax.library.model import Entry, Task
from deltax.library.store import Item
from deltax.library.tags import slug
from deltax.whole import whole

_LINES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_BOX = re.compile(r"(?P<before>^[\s>]*(?:[-*+]|\d+[.)])[ \t]+\[)(?P<symbol>.)(?P<after>\])")


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
        return _writable(before, data)
    real = Path(os.path.realpath(path))
    try:
        with whole(real) as scratch:
            scratch.write_bytes(new)
            scratch.chmod(real.stat().st_mode & 0o7777)
    except OSError as error:
        raise UserError(f"{path.name} cannot be written ({error.strerror}): your edit is kept in the library") from None
    return _writable(before, data)


def _writable(entry: Entry, data: bytes) -> tuple[str, ...]:
    if entry.origin.shape == "page":
        rows = [_text(raw, n) for n, raw in enumerate(_LINES.findall(data[:100_000]))]
        return ("text", "notes", "tags+", "tags-", *(("state",) if _head(rows)[0] else ()))
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
    if before.origin.shape == "page":
        stated = before.state != after.state
        if stated and before.text == after.text and before.tags == after.tags and not _head(list(map(_text, lines)))[0]:
            where = f"{before.origin.path}:{before.origin.line}"
            raise UserError(f"{where} has no checkbox and no properties: its state is kept in the library only")
        if stated or before.tags != after.tags:
            lines = _properties(lines, before, after)
    elif before.task != after.task or before.tags != after.tags:
        lines[at + moved] = _line(lines[at + moved], before, after)
    return b"".join(lines)


_STATUS = {"done": "read", "todo": "to-read", "doing": "reading", "hold": "on hold", "cancelled": "abandoned"}
_PROPERTY = re.compile(r"^(?P<key>tags?|keywords|status|state):(?P<colon>:?)(?P<value>.*?)(?P<end>[ \t]*)$", re.I)


def _head(rows: list[str]) -> tuple[list[int], int]:
    """Lines that hold a page's properties, and the line that closes its front matter (0: it has none)."""
    fenced = bool(rows) and rows[0].rstrip() == "---"
    close = next((n for n, row in enumerate(rows[1:], 1) if row.rstrip() in ("---", "...")), 0) if fenced else 0
    if close:
        return list(range(1, close)), close
    return [n for n, row in enumerate(rows[:12]) if re.match(r"\w[\w -]*::", row)], 0


def _properties(lines: list[bytes], before: Entry, after: Entry) -> list[bytes]:
    """A page's lines whose properties have the tags and the status of `after`: in its front matter, which is made where
    there is none, or in its lines `key:: value`. Raises UserError where they would not be read back so."""
    where = before.origin.path
    newline = next((raw[len(raw.rstrip(b"\r\n")) :] for raw in lines if raw.endswith((b"\r", b"\n"))), b"\n")
    rows = [_text(raw, n) for n, raw in enumerate(lines)]
    head, close = _head(rows)
    if (rows and rows[0].startswith("+++")) or (close and rows[1].lstrip().startswith("{")):
        raise UserError(
            f"the properties of {where} are no YAML: change them in the file; your edit is kept in the library"
        )
    colons = bool(head) and not close
    out = list(rows)
    added = [t for t in after.tags if t not in before.tags]
    removed = [t for t in before.tags if t not in after.tags]
    fresh: list[str] = []
    mark = "::" if colons else ":"
    if added or removed:
        at = next(
            (n for n in head if (m := _PROPERTY.match(out[n])) and m["key"].lower() in ("tags", "tag", "keywords")),
            None,
        )
        if at is None:
            if removed:
                raise UserError(f"the tag {removed[0]} of {where} is not in its properties: change it in the file")
            fresh.append(f"tags:: {', '.join(f'#{t}' for t in added)}" if colons else f"tags: [{', '.join(added)}]")
        else:
            _tags(out, at, close or len(out), added, removed)
    if before.state != after.state and (head or close):
        at = next((n for n in head if (m := _PROPERTY.match(out[n])) and m["key"].lower() in ("status", "state")), None)
        word = _STATUS.get(after.state, "")
        if at is None:
            fresh += [f"status{mark} {word}"] if word else []
        else:
            out[at] = f"{_PROPERTY.match(out[at])['key']}{mark} {word}".rstrip()
            following = at + 1
            while following < (close or len(out)) and re.match(r"\s*-\s", out[following]) and close:
                out[following] = None
                following += 1
    # Lines that stay keep their bytes.
    made = [
        raw if row == rows[n] else row.encode("utf-8").replace(b"\n", newline) + raw[len(raw.rstrip(b"\r\n")) :]
        for n, (raw, row) in enumerate(zip(lines, out, strict=True))
        if row is not None
    ]
    if fresh and not head and not close:
        fresh = ["---", *fresh, "---"]
        made = [*(row.encode("utf-8") + newline for row in fresh), *made]
    elif fresh:
        place = close - sum(row is None for row in out[:close]) if close else head[-1] + 1
        made[place:place] = [row.encode("utf-8") + newline for row in fresh]
    _reads_back(where, b"".join(made), before, after)
    return made


def _tags(out: list, at: int, end: int, added: list[str], removed: list[str]) -> None:
    """Tags in the way they are written: a list below, a list in brackets, or words between commas or blanks."""
    match = _PROPERTY.match(out[at])
    value = match["value"].strip()
    if not value:
        last = at
        for n in range(at + 1, end):
            item = re.match(r"\s*-\s+(.*?)\s*$", out[n] or "")
            if item is None:
                break
            last = n
            if item[1].strip("'\"").lstrip("#") in removed:
                out[n] = None
        indent = re.match(r"\s*", out[last] or "  ")[0] if last > at else "  "
        said = [f"{indent}- {tag}" for tag in added]
        keep = out[last]
        if said:
            out[last] = "\n".join([*([keep] if keep is not None else []), *said])
        return
    brackets = value.startswith("[") and value.endswith("]") and not value.startswith("[[")
    inner = value[1:-1] if brackets else value
    comma = "," in inner or brackets or "#" not in inner
    items = [i.strip() for i in (inner.split(",") if comma else inner.split()) if i.strip()]
    hashed = any(i.startswith("#") for i in items)
    items = [i for i in items if i.strip("'\"").lstrip("#") not in removed]
    items += [f"#{tag}" if hashed else tag for tag in added]
    text = (", " if comma else " ").join(items)
    out[at] = f"{match['key']}:{match['colon']} " + (f"[{text}]" if brackets else text)


def _reads_back(where: str, data: bytes, before: Entry, after: Entry) -> None:
    """Raises UserError unless the page reads with the tags and the state that it was to have."""
    from deltax.library import readers
    from deltax.library.files import decode

    entries = readers.read(before.origin.path, decode(before.origin.path, data).lines).entries
    same = len(entries) == 1 and set(entries[0].tags) == set(after.tags) and entries[0].title == before.title
    stated = before.state != after.state and bool(_head([_text(raw) for raw in _LINES.findall(data)])[0])
    if not same or (stated and before.tags == after.tags and entries[0].state != after.state):
        raise UserError(f"the properties of {where} cannot hold the edit as they are: change them in the file")


def _line(raw: bytes, before: Entry, after: Entry) -> bytes:
    text = raw.decode("utf-8", "surrogateescape")
    body = text.rstrip("\r\n")
    end = text[len(body) :]
    trailing = body[len(body.rstrip(" \t\u00a0")) :]
    body = body[: len(body) - len(trailing)]
    where = f"{before.origin.path}:{before.origin.line}"
    box = _BOX.match(body)
    table = before.origin.shape == "table"
    if box is None:
        if before.task != after.task and before.text == after.text and before.tags == after.tags:
            raise UserError(f"{where} has no checkbox: its state and dates are kept in the library only")
        if table and before.tags != after.tags:
            raise UserError(f"{where} is a row of a table: its tags are kept in the library only")
    added = tuple(t for t in after.tags if t not in before.tags)
    removed = tuple(t for t in before.tags if t not in after.tags)
    start = box.end() if box else 0
    said = tasks.peel(body[start:], box["symbol"] if box else "")
    for tag in removed:
        if tag not in said.tags:
            sections = {slug(part) for part in before.origin.section}
            reason = "a heading" if tag in sections else "the front matter"
            raise UserError(f"the tag {tag} of {where} comes from {reason}: change it there")
    task = after.task if box else said.task
    if box:
        _as_tasks_would(where, before, after)
        symbol = after.task.symbol if before.state != after.state else box["symbol"]
        body = body[: box.start("symbol")] + symbol + body[box.end("symbol") :]
    old = replace(said.task, dates=replace(said.task.dates, noted=before.task.dates.noted))
    body = body[:start] + tasks.with_fields(body[start:], old, task, added, removed)
    _same(where, said, tasks.peel(body[start:], task.symbol), task, before, after)
    return (body + trailing + end).encode("utf-8", "surrogateescape")


def _as_tasks_would(where: str, before: Entry, after: Entry) -> None:
    """Raises UserError for a tick that makes Obsidian Tasks do more than tick."""
    said = dict(before.task.fields)
    if after.state != "done" or before.state == "done":
        return
    if rule := said.get("repeat"):
        raise UserError(
            f"{where} repeats ({rule}), and Obsidian Tasks writes the next one when it is ticked: tick it there; "
            "your edit is kept in the library"
        )
    if said.get("onCompletion", "").casefold() == "delete":
        raise UserError(
            f"{where} is deleted by Obsidian Tasks when it is ticked: tick it there; your edit is kept in the library"
        )


def _same(where: str, said: tasks.Line, now: tasks.Line, task: Task, before: Entry, after: Entry) -> None:
    """Raises UserError unless the line reads as what was to be written."""
    dates = replace(now.task.dates, noted=task.dates.noted)
    tags = {*after.tags} - {*before.tags} <= {*now.tags} and not ({*before.tags} - {*after.tags}) & {*now.tags}
    fields = sorted(now.task.fields) == sorted(said.task.fields)
    words = now.text == said.text or before.tags != after.tags
    if not (dates == task.dates and now.task.priority == task.priority and tags and fields and words):
        raise UserError(
            f"{where} is not written so that the edit can stand in it: change it in the file; your edit is kept"
        )


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
