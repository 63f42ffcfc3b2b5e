"""Dates as people head a diary's pages: read by dateutil, never completed by guessing."""

import re
from datetime import datetime
from functools import lru_cache
from pathlib import PurePath

from dateutil import parser

_DATELIKE = re.compile(r"(?i)\d{4}|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec")
_AMBIGUOUS = re.compile(r"(\d{1,2})[/.-](\d{1,2})[/.-](\d{4}|\d{2})")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")


@lru_cache(maxsize=1024)
def heading_day(text: str) -> str | None:
    """ISO date of a heading that is only a date; `--MM-DD` where it names no year; "" where day and month can be
    swapped; None where it is no date."""
    text = text.strip().strip("[]").strip()
    if not 4 <= len(text) <= 40 or not _DATELIKE.search(text):
        return None
    if match := _AMBIGUOUS.fullmatch(text):
        first, second = int(match[1]), int(match[2])
        if first <= 12 and second <= 12 and first != second:
            return ""
    try:
        one = parser.parse(text, default=datetime(2000, 1, 1))
        other = parser.parse(text, default=datetime(2004, 2, 2))
    except (ValueError, OverflowError, TypeError):
        return None
    if (one.month, one.day) != (other.month, other.day):
        return None
    return one.strftime("%Y-%m-%d") if one.year == other.year else one.strftime("--%m-%d")


def file_day(path: str) -> str:
    """The date of a daily note from its file name, as Obsidian names them; "" for other names."""
    stem = PurePath(path).stem
    return stem if _ISO.fullmatch(stem) and heading_day(stem) else ""
