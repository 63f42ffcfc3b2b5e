"""Checkboxes and their fields as Obsidian Tasks and Dataview write them.

Fields are peeled from the end of the line, in at most 20 passes, so a mark in the middle of words is text. A variation
selector (U+FE0F) after a mark and no-break spaces are accepted, which the plugin's own parser does not promise.
"""

import re
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import lru_cache

from deltax.library.model import PRIORITIES, Dates, Task

_SPACE = r"[ \t\u00a0]"
CHECKBOX = re.compile(rf"\[(?P<symbol>.)\](?:{_SPACE}+|$)")
PRIORITY_MARKS = {"🔺": "highest", "⏫": "high", "🔼": "medium", "🔽": "low", "⏬": "lowest"}
DATE_MARKS = {
    "➕": "created",
    "🛫": "start",
    "⏳": "scheduled",
    "⌛": "scheduled",
    "📅": "due",
    "📆": "due",
    "🗓": "due",
    "✅": "done",
    "❌": "cancelled",
}
FIELD_MARKS = {"🔁": "repeat", "🏁": "onCompletion", "🆔": "id", "⛔": "dependsOn"}
_DATAVIEW_DATES = {"completion": "done"} | {f.name: f.name for f in fields(Dates)}
_STATES = {" ": "todo", "x": "done", "X": "done", "/": "doing", "-": "cancelled", "h": "hold"}
_SYMBOLS = {"todo": " ", "done": "x", "doing": "/", "cancelled": "-", "hold": "h"}

_ID = r"[\w-]+"
_VALUES = {"repeat": r"[a-zA-Z0-9, !]+", "onCompletion": r"[a-zA-Z]+", "id": _ID, "dependsOn": rf"{_ID}(?: *, *{_ID})*"}
_PEEL_PRIORITY = re.compile(rf"({'|'.join(PRIORITY_MARKS)})\ufe0f?$")
_PEEL_DATE = re.compile(rf"({'|'.join(DATE_MARKS)})\ufe0f?{_SPACE}*(\d{{4}}-\d{{2}}-\d{{2}})$")
_PEEL_FIELD = {key: re.compile(rf"{mark}\ufe0f?{_SPACE}*({_VALUES[key]})$") for mark, key in FIELD_MARKS.items()}
_KEY = r"(\w[\w \-]{0,60}):: *"
_PEEL_DATAVIEW = re.compile(rf"(?:\[{_KEY}([^\[\]]{{0,2000}})\]|\({_KEY}([^()]{{0,2000}})\))$")
_PEEL_TAG = re.compile(rf"(?:^|(?<={_SPACE}))#([^\s!@#$%^&*(),.?\":{{}}|<>\u00a0]+)$")
_TAG = re.compile(r"(?:^|(?<=[\s(]))#([^\s!@#$%^&*(),.?\":{}|<>]+)")
_BLOCK_LINK = re.compile(rf"{_SPACE}\^([a-zA-Z0-9-]+)$")
_FIELD = re.compile(rf"::|#|\^|{'|'.join([*PRIORITY_MARKS, *DATE_MARKS, *FIELD_MARKS])}")
_PASSES = 20


@dataclass(frozen=True)
class Line:
    """A task line taken apart: `text` without its fields, `tags` in the order written, `problems` in words."""

    text: str
    task: Task
    tags: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def checkbox(content: str) -> tuple[str, str] | None:
    """`[x] rest` -> ("x", "rest"); None when content does not start with a box."""
    match = CHECKBOX.match(content)
    return (match["symbol"], content[match.end() :]) if match else None


def state_of(symbol: str) -> str:
    """Read state of a status character; a character of the reader's own counts as todo, as in Tasks."""
    return _STATES.get(symbol, "todo")


def symbol_of(state: str) -> str:
    return _SYMBOLS.get(state, " ")


@lru_cache(maxsize=2048)
def peel(line: str, symbol: str = "") -> Line:
    """Take the fields off the end of `line`. An impossible date stays among `fields` and is named in `problems`."""
    rest = line.rstrip(" \t\u00a0")
    if not _FIELD.search(rest):
        state = state_of(symbol) if symbol else ""
        return Line(rest, Task(state, symbol))
    priority, dates, extra, tags, problems = "", {}, [], [], []

    def put_date(key: str, value: str) -> None:
        if not _real(value):
            problems.append(f"{key} date {value} is no day of the calendar")
            extra.append((key, value))
        elif key in dates:
            extra.append((key, dates[key]))
            dates[key] = value
        else:
            dates[key] = value

    rest, pieces = pieces_of(rest)
    for piece in reversed(pieces):
        if piece.key == "priority":
            priority = piece.value
        elif piece.key == "tag":
            tags.append(piece.value)
        elif piece.dated:
            put_date(piece.key, piece.value)
        else:
            extra.append((piece.key, piece.value))
    inline = tuple(tag for tag in _TAG.findall(rest) if not tag.isdigit())
    state = state_of(symbol) if symbol else ""
    task = Task(state, symbol, priority or "normal", Dates(**dates), tuple(reversed(extra)))
    return Line(rest, task, tuple(dict.fromkeys((*inline, *reversed(tags)))), tuple(problems))


@dataclass(frozen=True)
class Piece:
    """One field at the end of a line: what it says, and how it is written, with the blanks before it."""

    key: str
    value: str
    written: str

    @property
    def dated(self) -> bool:
        return self.key in DATE_MARKS.values() and bool(_DAY.fullmatch(self.value))


_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def pieces_of(line: str) -> tuple[str, list[Piece]]:
    """The words of a line, and the fields at its end in the order written. Words and pieces joined are the line."""
    rest, found = line, []
    blank = " \t\u00a0"
    if match := _BLOCK_LINK.search(rest.rstrip(blank)):
        rest = rest[: match.start()].rstrip(blank)
        found.append(Piece("block", match[1], line[len(rest) :]))
    for _ in range(_PASSES):
        body = rest.rstrip(blank)
        said = _piece(body)
        if said is None:
            break
        key, value, start = said
        shorter = body[:start].rstrip(blank)
        if shorter == rest:
            break
        found.append(Piece(key, value, rest[len(shorter) :]))
        rest = shorter
    return rest, found[::-1]


def _piece(body: str) -> tuple[str, str, int] | None:
    """(key, value, start) of the field that ends the line."""
    if match := _PEEL_PRIORITY.search(body):
        return "priority", PRIORITY_MARKS[match[1]], match.start()
    if match := _PEEL_DATE.search(body):
        return DATE_MARKS[match[1]], match[2], match.start()
    if match := _PEEL_TAG.search(body):
        return "tag", match[1], match.start()
    if match := _PEEL_DATAVIEW.search(body):
        key, value = (match[1] or match[3]).strip(), (match[2] if match[1] else match[4]).strip()
        folded = key.lower().replace(" ", "-")
        if folded in _DATAVIEW_DATES and _DAY.fullmatch(value):
            return _DATAVIEW_DATES[folded], value, match.start()
        if folded == "priority" and value.lower() in PRIORITIES:
            return "priority", value.lower(), match.start()
        return _camel(folded), value, match.start()
    for key, pattern in _PEEL_FIELD.items():
        if match := pattern.search(body):
            return key, match[1].strip(), match.start()
    return None


def with_fields(line: str, before: Task, after: Task, added: tuple[str, ...], removed: tuple[str, ...]) -> str:
    """A line whose fields say `after` instead of `before`, by the grammar of `peel`: what changes is changed where it
    stands, what is new goes behind the fields and before a `^block` id, which must end the line."""
    words, pieces = pieces_of(line)
    fresh: list[Piece] = []
    wanted = [("priority", before.priority, after.priority, "normal")]
    wanted += [(f.name, getattr(before.dates, f.name), getattr(after.dates, f.name), "") for f in fields(Dates)]
    for key, old, new, nothing in wanted:
        if old == new or key == "noted":
            continue
        place = next((n for n, piece in enumerate(pieces) if piece.key == key and piece.value == old), None)
        if place is None:
            fresh += [Piece(key, new, f" {_mark(key, new)}")] if new != nothing else []
        elif new == nothing:
            del pieces[place]
        else:
            pieces[place] = Piece(key, new, _in_place(pieces[place], new))
    for tag in removed:
        place = next((n for n, piece in enumerate(pieces) if (piece.key, piece.value) == ("tag", tag)), None)
        if place is None:
            words = re.sub(rf"(?:(?<=[\s(])|^)#{re.escape(tag)}(?=[\s)]|$)[ \t]?", "", words, count=1).rstrip(" \t")
        else:
            del pieces[place]
    fresh += [Piece("tag", tag, f" #{tag}") for tag in added]
    at = next((n for n, piece in enumerate(pieces) if piece.key == "block"), len(pieces))
    return words + "".join(piece.written for piece in [*pieces[:at], *fresh, *pieces[at:]])


def _mark(key: str, value: str) -> str:
    if key == "priority":
        return next(mark for mark, name in PRIORITY_MARKS.items() if name == value)
    return f"{_date_mark(key)} {value}"


def _in_place(piece: Piece, new: str) -> str:
    """The piece with another value, in the way it was written."""
    if "::" in piece.written:
        head, _, tail = piece.written.rpartition(piece.value)
        return f"{head or piece.written.partition('::')[0] + ':: '}{new}{tail if head else piece.written[-1]}"
    blanks = piece.written[: len(piece.written) - len(piece.written.lstrip(" \t\u00a0"))]
    if piece.key == "priority":
        return blanks + _mark("priority", new)
    return piece.written.replace(piece.value, new)


def render_fields(task: Task, tags: tuple[str, ...] = ()) -> str:
    """The end of a task line, in Tasks' own order, so that `peel` gives the same task back."""
    parts = [f"#{tag}" for tag in tags]
    block = ""
    marks = {name: mark for mark, name in FIELD_MARKS.items()}
    for key, value in task.fields:
        if key == "block":
            block = f"^{value}"
        elif key in marks and re.fullmatch(_VALUES[key], value):
            parts.append(f"{marks[key]} {value}")
        elif key in DATE_MARKS.values() and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
            parts.append(f"{_date_mark(key)} {value}")
        else:
            parts.append(f"[{key}:: {value}]")
    parts += [mark for mark, name in PRIORITY_MARKS.items() if name == task.priority]
    for key in ("created", "start", "scheduled", "due", "cancelled", "done"):
        if value := getattr(task.dates, key):
            parts.append(f"{_date_mark(key)} {value}")
    return " ".join([*parts, block] if block else parts)


def with_state(task: Task, state: str, today: str) -> Task:
    """The task as Tasks would leave it: done and cancelled carry their date, the others lose it."""
    done = (task.dates.done or today) if state == "done" else ""
    cancelled = (task.dates.cancelled or today) if state == "cancelled" else ""
    dates = replace(task.dates, done=done, cancelled=cancelled)
    return replace(task, state=state, symbol=symbol_of(state), dates=dates)


def _date_mark(key: str) -> str:
    return next(mark for mark, name in DATE_MARKS.items() if name == key)


def _camel(key: str) -> str:
    """Keys of Tasks in Tasks' spelling (dataview folds case), other keys as dataview folds them."""
    return {"oncompletion": "onCompletion", "dependson": "dependsOn"}.get(key, key)


def _real(value: str) -> bool:
    try:
        return bool(date.fromisoformat(value))
    except ValueError:
        return False
