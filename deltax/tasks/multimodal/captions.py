"""Pictures with captions, as users keep them.

pets.jsonl        a line for each pair, {"file": "cats/1.png", "caption": "a cat asleep"}; paths from where it lies
pets.csv          the same with a first line that names the columns, also as .tsv
pets/             pictures with a text of the same name beside each, 1.png and 1.txt; or one such table in it

The column of files may be called file, file_name or image, that of captions caption or text. A tenth of the pictures
is held out for validation and a tenth sealed, by content, equal pictures in one.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deltax.errors import UserError, nearest
from deltax.tasks.images.digits import SPLITS
from deltax.tasks.images.pictures import FAULTS, SUFFIXES, by_content, content_key, fitted, read_picture, report

TABLES = (".jsonl", ".csv", ".tsv")
FILES = ("file", "file_name", "image")
CAPTIONS = ("caption", "text")
_SAID = "its line needs a file and a caption"


@dataclass(frozen=True, eq=False)
class Captioned:
    """The pairs of a source that could be read.

    pixels    uint8 (N, size, size, C)
    captions  a text for each picture
    names     a path for each picture
    rows      the pairs of train, validation and sealed, ascending
    skipped   one sentence for each fault
    """

    name: str
    pixels: np.ndarray
    captions: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()


def load(source: str, *, size: int = 32, faults: str = "stop") -> Captioned:
    """The pairs of a table or a folder, read once in a process as long as its files stay the same.

    faults  "stop" at a line that cannot be read, a picture that is missing or corrupt and an empty or missing caption;
            "skip" leaves these out

    Raises UserError, one sentence with the fix.
    """
    if faults not in FAULTS:
        raise UserError(f"faults is 'stop' or 'skip', not {faults!r}")
    root = Path(os.path.abspath(os.path.expanduser(source)))
    if not source.strip() or not root.exists():
        hint = nearest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(
            f"no file or folder {source!r}{hint}: give a .jsonl or .csv of files and captions, or a folder of "
            f"pictures with a .txt beside each"
        )
    table = _table(root)
    inside = sorted(p for p in (root if root.is_dir() else root.parent).rglob("*") if p.is_file())
    stamp = tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in inside)
    album = _load(root, table, stamp, size, faults)
    if album.skipped:
        report(album.name, album.skipped, faults)
    return album


def _table(root: Path) -> Path | None:
    """The table that a source is or has; None for a folder of texts beside pictures."""
    if root.is_file():
        if root.suffix.lower() not in TABLES:
            raise UserError(f"{root.name} is no table of captions: give a .jsonl, .csv or .tsv")
        return root
    found = sorted(p for p in root.iterdir() if p.suffix.lower() in TABLES)
    if len(found) > 1:
        raise UserError(f"{root.name} has {' and '.join(p.name for p in found[:3])}: name the one to read")
    return found[0] if found else None


@lru_cache(maxsize=2)
def _load(root: Path, table: Path | None, stamp: tuple[Any, ...], size: int, policy: str) -> Captioned:
    base, listed = (table.parent, _listed(table)) if table else (root, _beside(root))
    faults, found = [], []
    for where, name, caption, fault in listed:
        if fault is None and not caption.strip():
            fault = f"{where} has an empty caption: write one or leave the picture out"
        if fault is None and not (base / name).is_file():
            fault = f"{where} names {name}, which is not there: add the picture or take the line out"
        if fault is not None:
            faults.append(fault)
            continue
        try:
            whole = read_picture(base / name, name)
        except UserError as error:
            faults.append(str(error))
            continue
        found.append((name, caption.strip(), content_key(whole), fitted(whole, size, whole.shape[-1])))
    if policy == "stop":
        report(root.name, faults, policy)
    if len(found) < 3:
        raise UserError(f"{root.name} holds {len(found)} pictures with captions: give at least 3, and rather hundreds")
    channels = 1 if all(p.shape[-1] == 1 for *_, p in found) else 3
    pixels = np.stack([fitted(p, size, channels) for *_, p in found])
    keys = np.array([key for _, _, key, _ in found], dtype=np.uint64)
    where_ = by_content(keys, np.zeros(len(found), dtype=int))
    rows = {split: np.flatnonzero(where_ == i) for i, split in enumerate(SPLITS)}
    if not len(rows["validation"]):
        raise UserError(f"{root.name} has too few different pictures to hold some out: give at least 10")
    names, captions = zip(*((name, caption) for name, caption, *_ in found), strict=True)
    return Captioned(root.name, pixels, captions, names, rows, tuple(faults))


Listed = Iterator[tuple[str, str, str, str | None]]  # where it says so, file, caption, what is wrong


def _beside(root: Path) -> Listed:
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not pictures:
        raise UserError(f"{root.name} holds no pictures: give a folder of pictures with a .txt beside each, or a table")
    if not any(p.with_suffix(".txt").exists() for p in pictures):
        raise UserError(
            f"no picture of {root.name} has a caption: put a .txt of the same name beside each, or give a .jsonl or "
            f".csv of files and captions"
        )
    for picture in pictures:
        name, text = picture.relative_to(root).as_posix(), picture.with_suffix(".txt")
        said = text.relative_to(root).as_posix()
        if not text.is_file():
            yield name, name, "", f"{name} has no {said} beside it: write its caption there"
            continue
        try:
            yield said, name, text.read_text(encoding="utf-8"), None
        except UnicodeDecodeError:
            yield said, name, "", f"{said} is not text in UTF-8: save it again as that"


def _listed(table: Path) -> Listed:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table.name} is not text in UTF-8: save it again as that") from error
    if table.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _pair(f"{table.name}:{number}", _parsed(line))
        return
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
    columns = reader.fieldnames or ()
    if not (set(columns) & set(FILES) and set(columns) & set(CAPTIONS)):
        raise UserError(f"{table.name} has columns {', '.join(columns) or 'none'}: its first line must be file,caption")
    for row in reader:
        yield _pair(f"{table.name}:{reader.line_num}", row)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _pair(where: str, row: Any) -> tuple[str, str, str, str | None]:
    if not isinstance(row, dict):
        return where, "", "", f'{where} is no JSON object: write {{"file": ..., "caption": ...}}'
    name, caption = (next((row[k] for k in keys if row.get(k) is not None), None) for keys in (FILES, CAPTIONS))
    if not (isinstance(name, str) and name and isinstance(caption, str)):
        return where, "", "", f"{where} names no {'caption' if isinstance(name, str) and name else 'file'}: {_SAID}"
    return where, name, caption, None
