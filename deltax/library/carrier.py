"""What a format cannot hold rides along: for each such field, the value the format gave back and the true one.

On the way in the true value replaces the other only where the file still says what it said when it was written: an edit
made in another program wins.
"""

import json
import re
from typing import Any

from deltax.library.model import FIELDS

MARK = "<!-- deltax "
_COMMENT = re.compile(r"\s*<!-- deltax ((?:(?!<!--).)*?) -->(?=\s*$)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_ESCAPED = {char: f"\\u{ord(char):04x}" for char in "{}|<>@%"}


def pack(seen: dict[str, Any], true: dict[str, Any]) -> str:
    """JSON of the fields that differ; "" when none does. Strings hold no brace, bar, angle bracket, @ or %."""
    differing = {key: [seen[key], true[key]] for key in FIELDS if seen[key] != true[key]}
    return dump(differing) if differing else ""


def dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return _STRING.sub(lambda m: "".join(_ESCAPED.get(c, c) for c in m[0]), text)


def unpack(packed: str, seen: dict[str, Any]) -> dict[str, Any]:
    """`seen` with the true values where it is unchanged. Something that is no such JSON changes nothing."""
    try:
        differing = json.loads(packed)
    except (ValueError, RecursionError):
        return seen
    if not isinstance(differing, dict):
        return seen
    out = dict(seen)
    for key, pair in differing.items():
        if key in FIELDS and isinstance(pair, list) and len(pair) == 2 and seen[key] == pair[0]:
            out[key] = pair[1]
    return out


def comment(packed: str) -> str:
    return f"{MARK}{packed or '{}'} -->"


def take(text: str) -> tuple[str, str | None]:
    """Text without the comment at its end, and what the comment held (None: no comment)."""
    if MARK not in text:
        return text, None
    found = _COMMENT.search(text)
    return (text[: found.start()] + text[found.end() :], found[1]) if found else (text, None)
