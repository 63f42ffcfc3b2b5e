"""The properties at the head of a note: YAML as people write it, TOML, or one line of JSON of a published garden.

What is written as text stays text: `arxiv: 2106.09680` is no number.
"""

import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import yaml

LIMIT = 256_000
"""Characters of front matter that are read; more is no set of properties."""


@dataclass(frozen=True)
class FrontMatter:
    """`lines` of the file are taken by the fences and what is between; `problem` is (line from 1, what is wrong)."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: int = 0
    problem: tuple[int, str] | None = None


class _Loader(yaml.BaseLoader):
    """Safe YAML whose scalars are strings, without anchors: an alias can refer to itself or grow without bound."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        return None if node.style is None and value in ("null", "~", "Null", "NULL") else value


_FENCES = {"---": ("---", "..."), "+++": ("+++",)}
_PAIR = re.compile(r"(?P<key>\w[\w .\-/]{0,60}?)\s*:(?:\s+(?P<value>.*))?$")
_HASHES = re.compile(r"(?P<key>\w[\w \-]{0,60}):\s+(?P<value>#\S.*)$")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def read(lines: list[str]) -> FrontMatter:
    """Front matter of a file given as its lines. Broken front matter is reported; what can be read of it is."""
    fence = lines[0].rstrip() if lines else ""
    if fence not in _FENCES:
        return FrontMatter()
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() in _FENCES[fence]), None)
    if end is None:
        looks = len(lines) > 1 and (":" in lines[1] or lines[1].startswith("{"))
        return FrontMatter(problem=(1, "front matter opens and is never closed: add a line ---") if looks else None)
    text = "\n".join(lines[1:end])
    if len(text) > LIMIT:
        return FrontMatter(lines=end + 1, problem=(1, f"front matter is longer than {LIMIT} characters: not read"))
    if not text.lstrip().startswith("{") and fence == "---":
        return _yaml(lines[1:end])
    try:
        loaded = json.loads(text) if fence == "---" else tomllib.loads(text, parse_float=str)
        values = {str(key): plain(value) for key, value in loaded.items()}
    except json.JSONDecodeError as error:
        return FrontMatter(lines=end + 1, problem=(error.lineno + 1, f"front matter is not JSON: {error.msg}"))
    except tomllib.TOMLDecodeError as error:
        return FrontMatter(lines=end + 1, problem=(1, f"front matter is not TOML: {error}"))
    except (RecursionError, ValueError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return FrontMatter(lines=end + 1, problem=(1, f"front matter cannot be read: {what}"))
    return FrontMatter(values | _properties(values), end + 1)


def _yaml(lines: list[str]) -> FrontMatter:
    """YAML, or where it is none the lines of `key: value` and `- item` that it has."""
    count, text = len(lines) + 2, "\n".join(lines)
    problem = None
    try:
        loaded = yaml.load(text, _Loader)
        if loaded is None or loaded == "":
            return FrontMatter(lines=count)
        if not isinstance(loaded, dict):
            return FrontMatter(lines=count, problem=(2, "front matter is not a set of `key: value` properties"))
        values = {str(key): plain(value) for key, value in loaded.items()}
    except yaml.YAMLError as error:
        values, unread = _pairs(lines)
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "cannot be read"
        if unread is not None:
            problem = ((mark.line if mark else unread) + 2, f"front matter is not YAML: {what}")
    except (RecursionError, ValueError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return FrontMatter(lines=count, problem=(1, f"front matter cannot be read: {what}"))
    for number, line in enumerate(lines):
        match = _HASHES.match(line)
        if match and not values.get(match["key"]):
            values[match["key"]] = match["value"]  # `tags: #a, #b`, a comment to YAML
        key, _, value = line.partition(":")
        if problem is None and _DAY.fullmatch(value.strip()) and not _real(value.strip()):
            problem = (number + 2, f"front matter says {key}: {value.strip()}, which is no day of the calendar")
    return FrontMatter(values | _properties(values), count, problem)


def _pairs(lines: list[str]) -> tuple[dict[str, Any], int | None]:
    """Properties line by line, and the first line that is none."""
    values: dict[str, Any] = {}
    key, unread = "", None
    for number, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if key and (item := re.match(r"\s*-\s+(.*)", line)):
            there = values[key]
            values[key] = [*(there if isinstance(there, list) else [there] if there else []), _scalar(item[1])]
            continue
        match = _PAIR.match(line)
        value = (match["value"] or "").strip() if match else ""
        if match and not re.match(r"[&*!|>{]|\[(?!\[)[^\]]*$", value):
            key = match["key"].strip()
            items = value.startswith("[") and value.endswith("]") and not value.startswith("[[")
            values[key] = [_scalar(i) for i in value[1:-1].split(",")] if items else _scalar(value)
        elif key and line[0] == " " and match is None and isinstance(values[key], str):
            values[key] = f"{values[key]} {line.strip()}".strip()
        elif unread is None:
            unread = number
    return values, unread


def _scalar(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _real(day: str) -> bool:
    try:
        return bool(date.fromisoformat(day))
    except ValueError:
        return False


def plain(value: Any) -> Any:
    """YAML values as JSON has them: dates become ISO text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _properties(values: dict[str, Any]) -> dict[str, Any]:
    """A published garden nests the reader's own properties; they count as if they stood at the top."""
    nested = values.get("dg-note-properties")
    return {k: v for k, v in nested.items() if k not in values} if isinstance(nested, dict) else {}


def strings(value: Any) -> tuple[str, ...]:
    """A property that may be a list, one value, or values between commas, as text values without wiki brackets."""
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else _between(str(value))
    found: list[str] = []
    for item in items:
        if isinstance(item, list):
            found += strings(item)
        elif isinstance(item, str | int | float) and str(item).strip():
            found.append(unwiki(str(item)))
    return tuple(found)


def _between(text: str) -> list[str]:
    """Values between commas; a comma inside `[[...]]` parts none."""
    return re.findall(r"(?:\[\[[^\]]*\]\]|[^,])+", text)


def unwiki(text: str) -> str:
    """`[[page|words]]` as its words."""
    return re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text).strip()


def tags(values: dict[str, Any]) -> tuple[str, ...]:
    """Tags of the page, without their #; `dg-home` is the tag gardenEntry, as the garden publishes it."""
    found = []
    for key in ("tags", "tag", "keywords"):
        value = values.get(key)
        words = value.split() if isinstance(value, str) and "#" in value and "," not in value else value
        found += [tag.lstrip("#") for tag in strings(words)]
    home = str(values.get("dg-home", "")).lower() == "true"
    return tuple(dict.fromkeys([*filter(None, found), *(["gardenEntry"] if home else [])]))
