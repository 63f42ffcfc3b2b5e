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


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = "|".join(_MONTHS)
_YEAR_MONTH = re.compile(r"(?P<y>(?:19|20)\d{2})\s*[-./]\s*(?P<m>0?[1-9]|1[0-2])(?:[-./](?P<d>\d{1,2}))?")
_MONTH_YEAR = re.compile(r"(?P<m>0?[1-9]|1[0-2])\s*/\s*(?P<y>(?:19|20)\d{2})")
_WORDS = re.compile(
    rf"(?i)(?P<y>(?:19|20)\d{{2}})\s*[-–—,:/ ]\s*(?P<m>{_MONTH})[a-z]*\.?|"
    rf"(?P<m2>{_MONTH})[a-z]*\.?,?\s+(?P<y2>(?:19|20)\d{{2}})"
)
_COUNT = re.compile(r"\s*[(\[]\s*\d+\s*(?:papers?|notes?|entries|items)?\s*[)\]]\s*$|\s*[:：]\s*$")


def written(text: str) -> str:
    """A day, month or year that a whole text is: `2021-09-11`, `2021-09`, `2021`; "" where it is none. A count behind
    it, as `2021-09 (11)`, is left out."""
    text = _COUNT.sub("", text.strip().strip("[]*_").strip())
    if re.fullmatch(r"(?:19|20)\d{2}", text):
        return text
    if match := _YEAR_MONTH.fullmatch(text):
        day = f"-{int(match['d']):02}" if match["d"] and 1 <= int(match["d"]) <= 31 else ""
        return f"{match['y']}-{int(match['m']):02}{day}"
    if match := _MONTH_YEAR.fullmatch(text):
        return f"{match['y']}-{int(match['m']):02}"
    if match := _WORDS.fullmatch(text):
        month = _MONTHS.index((match["m"] or match["m2"]).lower()[:3]) + 1
        return f"{match['y'] or match['y2']}-{month:02}"
    return ""


def month_name(text: str) -> int | None:
    """The month that a whole text names."""
    text = _COUNT.sub("", text.strip()).strip().casefold()
    full = re.fullmatch(rf"({_MONTH})[a-z]*\.?", text)
    return _MONTHS.index(full[1]) + 1 if full and len(text) <= 9 and text not in ("mark", "march madness") else None


def file_day(path: str) -> str:
    """The date of a daily note from its file name, as Obsidian names them; "" for other names."""
    stem = PurePath(path).stem
    return stem if _ISO.fullmatch(stem) and heading_day(stem) else ""
