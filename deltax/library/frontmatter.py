"""The properties at the head of a note: YAML, or one line of JSON as a published digital garden writes it."""

import json
import math
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


class _Loader(yaml.SafeLoader):
    """Safe YAML without anchors: an alias can refer to itself or grow without bound."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
        return super().compose_node(parent, index)


def read(lines: list[str]) -> FrontMatter:
    """Front matter of a file given as its lines. Broken front matter is reported and its lines stay unread."""
    if not lines or lines[0].rstrip() != "---":
        return FrontMatter()
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), None)
    if end is None:
        looks = len(lines) > 1 and (":" in lines[1] or lines[1].startswith("{"))
        return FrontMatter(problem=(1, "front matter opens and is never closed: add a line ---") if looks else None)
    text = "\n".join(lines[1:end])
    if len(text) > LIMIT:
        return FrontMatter(lines=end + 1, problem=(1, f"front matter is longer than {LIMIT} characters: not read"))
    try:
        loaded = json.loads(text) if text.lstrip().startswith("{") else yaml.load(text, _Loader)
    except json.JSONDecodeError as error:
        return FrontMatter(lines=end + 1, problem=(error.lineno + 1, f"front matter is not JSON: {error.msg}"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "cannot be read"
        return FrontMatter(lines=end + 1, problem=((mark.line if mark else 0) + 2, f"front matter is not YAML: {what}"))
    except (RecursionError, ValueError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return FrontMatter(lines=end + 1, problem=(1, f"front matter cannot be read: {what}"))
    if loaded is None:
        return FrontMatter(lines=end + 1)
    if not isinstance(loaded, dict):
        return FrontMatter(lines=end + 1, problem=(2, "front matter is not a set of `key: value` properties"))
    try:
        values = {str(key): plain(value) for key, value in loaded.items()}
    except RecursionError:
        return FrontMatter(lines=end + 1, problem=(1, "front matter is nested too deep"))
    return FrontMatter(values | _properties(values), end + 1)


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
    """A property that may be a list, one value, or values between commas, as text values."""
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else str(value).split(",")
    return tuple(str(item).strip() for item in items if isinstance(item, str | int | float) and str(item).strip())


def tags(values: dict[str, Any]) -> tuple[str, ...]:
    """Tags of the page, without their #; `dg-home` is the tag gardenEntry, as the garden publishes it."""
    found = [tag.lstrip("#") for key in ("tags", "tag") for tag in strings(values.get(key))]
    home = str(values.get("dg-home", "")).lower() == "true"
    return tuple(dict.fromkeys([*found, *(["gardenEntry"] if home else [])]))
