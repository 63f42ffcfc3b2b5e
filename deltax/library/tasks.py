"""Checkboxes and their fields as Obsidian Tasks and Dataview write them.

Fields are peeled from the end of the line, in at most 20 passes, so a mark in the middle of words is text. A variation
selector (U+FE0F) after a mark and no-break spaces are accepted, which the plugin's own parser does not promise.
"""

import re
from dataclasses import dataclass, fields, replace
from datetime import date

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


def peel(line: str, symbol: str = "") -> Line:
    """Take the fields off the end of `line`. An impossible date stays among `fields` and is named in `problems`."""
    rest = line.rstrip(" \t\u00a0")
    if not _FIELD.search(rest):
        state = state_of(symbol) if symbol else ""
        return Line(rest, Task(state, symbol))
    priority, dates, extra, tags, problems = "", {}, [], [], []
    if match := _BLOCK_LINK.search(rest):
        extra.append(("block", match[1]))
        rest = rest[: match.start()].rstrip(" \t\u00a0")

    def put_date(key: str, value: str) -> None:
        if not _real(value):
            problems.append(f"{key} date {value} is no day of the calendar")
            extra.append((key, value))
        elif key in dates:
            extra.append((key, dates[key]))
            dates[key] = value
        else:
            dates[key] = value

    for _ in range(_PASSES):
        before = rest
        if match := _PEEL_PRIORITY.search(rest):
            priority = PRIORITY_MARKS[match[1]]
        elif match := _PEEL_DATE.search(rest):
            put_date(DATE_MARKS[match[1]], match[2])
        elif match := _PEEL_TAG.search(rest):
            tags.append(match[1])
        elif match := _PEEL_DATAVIEW.search(rest):
            key, value = (match[1] or match[3]).strip(), (match[2] if match[1] else match[4]).strip()
            folded = key.lower().replace(" ", "-")
            if folded in _DATAVIEW_DATES and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
                put_date(_DATAVIEW_DATES[folded], value)
            elif folded == "priority" and value.lower() in PRIORITIES:
                priority = value.lower()
            else:
                extra.append((_camel(folded), value))
        else:
            for key, pattern in _PEEL_FIELD.items():
                if match := pattern.search(rest):
                    extra.append((key, match[1].strip()))
                    break
        if match is None:
            break
        rest = rest[: match.start()].rstrip(" \t\u00a0")
        if rest == before:
            break
    inline = tuple(tag for tag in _TAG.findall(rest) if not tag.isdigit())
    state = state_of(symbol) if symbol else ""
    task = Task(state, symbol, priority or "normal", Dates(**dates), tuple(reversed(extra)))
    return Line(rest, task, tuple(dict.fromkeys((*inline, *reversed(tags)))), tuple(problems))


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
