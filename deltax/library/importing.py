"""Files into the library: read, compared with what is there, and accounted for line by line."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from deltax.errors import UserError
from deltax.library import files, readers
from deltax.library.identifiers import normal_title
from deltax.library.model import Reading, Remark
from deltax.library.store import Library

READERS = "3"
"""Raised when reading changes, so that files are read again."""

_BATCH = 256


@dataclass
class Report:
    """What an import found and changed. Counts of `found` are over the files that were read this time; `skipped` are
    bibliographies in the folders, which come in when they are named."""

    files: int = 0
    unchanged_files: int = 0
    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    found: dict[str, int] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def count(self, reading: Reading) -> None:
        for entry in reading.entries:
            dates = entry.task.dates
            for name, there in (
                ("entries", True),
                ("with an identifier", bool(entry.reference.ids)),
                ("tasks", bool(entry.task.symbol)),
                ("read", entry.state == "done"),
                ("priorities", entry.task.priority != "normal"),
                ("dates", any(vars(dates).values())),
            ):
                self.found[name] = self.found.get(name, 0) + there


def import_paths(library: Library, paths: Iterable[str | Path], dry_run: bool = False) -> Report:
    """Take in files and folders. Importing the same again changes nothing; dry_run changes nothing at all. A file that
    cannot be read becomes a remark and the others come in. Raises UserError for a path that does not exist."""
    report = Report()
    paths = list(paths)
    found = list(files.find(paths))
    lost = library.missing()
    report.skipped = [str(path) for path in files.skipped(paths) if library.digest(str(path)) is None]
    with library.writing(keep=False) if dry_run else _nothing():
        for start in range(0, len(found), _BATCH):
            _batch(library, found[start : start + _BATCH], report, lost)
        if report.files > report.unchanged_files:
            library.regroup()
            report.remarks += files.cycles(library.embeds())
    return report


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _batch(library: Library, paths: list[Path], report: Report, lost: list[str]) -> None:
    """Read files first, then write them in one transaction, so that another process waits for writing only. `lost`: the
    files that the library knows and that are no longer where they were."""
    read = []
    for path in paths:
        report.files += 1
        try:
            text = files.load(path)
        except OSError as error:
            report.remarks.append(Remark(str(path), 0, 0, f"cannot be read: {error.strerror or error}"))
            continue
        except UserError as error:
            report.remarks.append(Remark(str(path), 0, 0, str(error)))
            continue
        digest = hashlib.blake2b(READERS.encode() + text.data, digest_size=16).hexdigest()
        known = library.digest(str(path))
        if known is None:
            _follow(library, path, digest)
            known = library.digest(str(path))
        if known == digest:
            report.unchanged_files += 1
            continue
        reading = _read(path, text)
        if known is None and lost:
            _recognise(library, path, reading, lost)
        read.append((reading, digest, files.embeds(text.lines)))
    with library.writing():
        for reading, digest, embeds in read:
            changes = library.put(reading, digest, embeds)
            report.count(reading)
            report.added += changes.added
            report.updated += changes.updated
            report.removed += changes.removed
            report.unchanged += changes.unchanged
            report.remarks += reading.remarks
            report.remarks += [
                Remark(reading.path, line, line, f"{name} changed here, and your own edit of it stays")
                for line, name in changes.kept
            ]


def _read(path: Path, text: files.Text) -> Reading:
    if path.suffix.lower() in files.BIBLIOGRAPHIES:
        from deltax.library import formats

        reading = formats.read_file(str(path), "\n".join(text.lines))
    else:
        reading = readers.read(str(path), text.lines)
    return Reading(reading.path, reading.entries, text.remarks + reading.remarks, reading.front)


_SAME = 0.6
"""Share of a new file's entries that a missing file had, from which it is that file under another name."""


def _recognise(library: Library, path: Path, reading: Reading, lost: list[str]) -> None:
    """A file that was renamed and edited at once is known by what its entries name, when its old place is empty."""
    names = {key for e in reading.entries for key in (*e.reference.identity, normal_title(e.title)) if key}
    if not names:
        return
    shared = [
        (len(names & there) / min(len(names), len(there)), old) for old in lost if (there := library.names_in(old))
    ]
    score, old = max(shared, default=(0.0, ""))
    if score >= _SAME:
        library.rename(old, str(path))


def _follow(library: Library, path: Path, digest: str) -> None:
    """A file that was moved or renamed is known by its content, when its old place is empty."""
    for old in library.paths_of(digest):
        if not Path(old).exists():
            library.rename(old, str(path))
            return
