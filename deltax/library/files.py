"""Files of notes: found, decoded, and followed from one to another, without trusting any of them."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deltax.errors import UserError
from deltax.library.markdown import LONG
from deltax.library.model import Remark

MARKDOWN = (".md", ".markdown")
BIBLIOGRAPHIES = (".bib", ".ris", ".json", ".csv")
LARGEST = 256 << 20
"""Bytes of a file that is read."""

_EMBED = re.compile(r"(!?)\[\[([^\[\]|#^\n]{1,300})")


@dataclass(frozen=True)
class Text:
    """A decoded file: lines without their ends, and what was wrong with it."""

    path: str
    lines: list[str]
    data: bytes
    remarks: tuple[Remark, ...] = ()


def find(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files to read under `paths`, each once, in order: Markdown in folders (hidden ones are skipped, links to folders
    are not followed), and any file named outright. Raises UserError for a path that does not exist."""
    seen: set[str] = set()
    for given in map(Path, paths):
        given = given.expanduser()
        if not given.exists():
            raise UserError(f"there is no file or folder {str(given)!r}")
        if given.is_file() and given.suffix.lower() not in MARKDOWN + BIBLIOGRAPHIES:
            known = " ".join(MARKDOWN + BIBLIOGRAPHIES)
            raise UserError(f"{given.name} is no kind of notes that dx notes reads: give one of {known}")
        for path in [given] if given.is_file() else _walk(given):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield Path(os.path.abspath(path))


def _walk(folder: Path, endings: tuple[str, ...] = MARKDOWN) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(endings):
                yield Path(root, name)


def skipped(paths: Iterable[str | Path]) -> list[Path]:
    """Bibliographies (.bib, .ris) in the folders among `paths`: `find` leaves them out."""
    found = []
    for folder in map(Path, paths):
        if folder.expanduser().is_dir():
            found += [Path(os.path.abspath(path)) for path in _walk(folder.expanduser(), (".bib", ".ris"))]
    return found


def load(path: Path) -> Text:
    """One file, decoded. Raises OSError when it cannot be read, UserError when it is no text at all."""
    size = path.stat().st_size
    if size > LARGEST:
        raise UserError(f"{path.name} has {size >> 20} MB: split it, files up to {LARGEST >> 20} MB are read")
    return decode(str(path), path.read_bytes())


def decode(path: str, data: bytes) -> Text:
    """Bytes as lines. Bytes that are not UTF-8 become U+FFFD, and each line that has some is named; a bibliography that
    is not UTF-8 is latin-1, as older programs write it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16: save it as UTF-8")
    body = data.removeprefix(b"\xef\xbb\xbf")
    remarks = []
    try:
        lines = split(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        if path.lower().endswith(BIBLIOGRAPHIES):
            number = body.count(b"\n", 0, error.start) + 1
            remarks.append(Remark(path, number, number, "not UTF-8: the file is read as latin-1 (Windows-1252)"))
            return Text(path, split(body.decode("cp1252", "replace")), data, tuple(remarks))
        lines = []
        for number, raw in enumerate(split_bytes(body), 1):
            try:
                lines.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                lines.append(raw.decode("utf-8", "replace"))
                reason = f"not UTF-8 (byte {raw[error.start]:#04x}): read with U+FFFD in its place"
                remarks.append(Remark(path, number, number, reason, lines[-1][:LONG]))
    if "\0" in body[:1_000_000].decode("latin-1"):
        lines = [line.replace("\0", "\ufffd") for line in lines]
        number = next((n for n, line in enumerate(lines, 1) if "\ufffd" in line), 1)
        remarks.append(Remark(path, number, number, "holds zero bytes: read with U+FFFD in their place"))
    return Text(path, lines, data, tuple(remarks))


def split(text: str) -> list[str]:
    """Lines as Markdown counts them: only \\n, \\r\\n and \\r end one."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def split_bytes(data: bytes) -> list[bytes]:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def embeds(lines: list[str]) -> list[tuple[int, str]]:
    """(line, note) for every `![[note]]`."""
    return [
        (number, match[2].strip())
        for number, line in enumerate(lines, 1)
        if len(line) <= LONG and "![[" in line
        for match in _EMBED.finditer(line)
        if match[1]
    ]


def cycles(embedded: dict[str, list[tuple[int, str]]]) -> list[Remark]:
    """Notes that embed themselves through others: a remark on the line that closes each circle. Names are resolved as
    Obsidian does, by file name without folder and suffix."""
    by_name: dict[str, str] = {}
    for path in embedded:
        by_name.setdefault(Path(path).stem.casefold(), path)
    state: dict[str, int] = {}
    remarks = []
    for root in embedded:
        if root in state:
            continue
        trail: list[tuple[str, Iterator[tuple[int, str]]]] = [(root, iter(embedded[root]))]
        state[root] = 1
        while trail:
            path, rest = trail[-1]
            line, name = next(rest, (0, ""))
            if not line:
                state[path] = 2
                trail.pop()
                continue
            target = by_name.get(Path(name).name.removesuffix(".md").casefold())
            if target is None or state.get(target) == 2:
                continue
            if state.get(target) == 1:
                names = [Path(p).stem for p, _ in trail]
                circle = [*names[[p for p, _ in trail].index(target) :], Path(target).stem]
                remarks.append(Remark(path, line, line, f"embeds itself: {' > '.join(circle)}"))
                continue
            state[target] = 1
            trail.append((target, iter(embedded[target])))
    return remarks
