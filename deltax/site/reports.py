"""Reports of comparisons, as `dx report` writes them: one file each, styles and pictures inside, no script."""

import hashlib
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_NEEDED = {"budget", "environment", "earlier", "factors", "ladder", "level", "seeds", "spent"}


class Reports:
    """Made when first asked for, which takes a second or two, and kept in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def of(self, record: dict[str, Any]) -> str | None:
        """The report of a stored comparison; None of one whose record is too old to report on."""
        if not has_report(record):
            return None
        path = self.folder / f"{_digest(json.dumps(record, sort_keys=True) + _maker())}.html"
        with suppress(OSError):
            return path.read_text(encoding="utf-8")
        from deltax.lab import report  # loads matplotlib

        text = report.html(record)
        with suppress(OSError):
            report.save(record, path)
        return text


def has_report(record: dict[str, Any]) -> bool:
    """Comparisons that an early deltax stored lack what a report says."""
    return record.keys() >= _NEEDED


@cache
def _maker() -> str:
    """Changes when reports would look otherwise."""
    import deltax.lab

    lab = Path(deltax.lab.__file__).parent
    files = (lab / "report.py", lab / "figures.py", lab / "templates" / "report.html", lab / "templates" / "head.html")
    return " ".join(_digest(path.read_text(encoding="utf-8")) for path in files)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
