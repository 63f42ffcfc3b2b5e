"""The library: one SQLite file with full-text search. What files say and what the reader edits are kept apart."""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltax import sqlite
from deltax.errors import UserError
from deltax.home import home
from deltax.library import edits as edits_
from deltax.library import match, works
from deltax.library.identifiers import normal_title
from deltax.library.model import Entry, Identifier, Origin, Reading, Reference, Remark, flat, unflat

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, digest TEXT NOT NULL, front TEXT NOT NULL, embeds TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, source INTEGER, position INTEGER NOT NULL, work INTEGER NOT NULL, origin TEXT NOT NULL,
    data TEXT NOT NULL, edits TEXT NOT NULL DEFAULT '{}', keys TEXT NOT NULL, norm TEXT NOT NULL,
    state TEXT NOT NULL, gone INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS entries_source ON entries (source);
CREATE INDEX IF NOT EXISTS entries_work ON entries (work);
CREATE TABLE IF NOT EXISTS remarks (source INTEGER NOT NULL, line INTEGER, last INTEGER, reason TEXT, text TEXT);
CREATE INDEX IF NOT EXISTS remarks_source ON remarks (source);
CREATE TABLE IF NOT EXISTS joins (work TEXT PRIMARY KEY, paper TEXT NOT NULL, verdict TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS metadata (id TEXT PRIMARY KEY, record TEXT NOT NULL, fetched REAL NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(title, name, text, tags, tokenize='unicode61 remove_diacritics 2');
"""
_WEIGHTS = "10.0, 8.0, 1.0, 4.0"


@dataclass(frozen=True)
class Item:
    """An entry in the library: as the reader sees it (`entry`), the fields edited here, and its work. `gone`: it is no
    longer in its file and stays because it carries edits."""

    id: int
    work: int
    entry: Entry
    edits: dict[str, Any]
    gone: bool = False


@dataclass(frozen=True)
class Changes:
    """What taking a file in changed. `kept`: (line, field) where an edit made here outweighs a change in the file."""

    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    kept: tuple[tuple[int, str], ...] = ()


class Library:
    """The library at `path` (home()/library.sqlite). Two processes may use it at once. Raises UserError for a file that
    is no library."""

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else home() / "library.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite.opened(str(self.path))
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise UserError(f"{self.path.name} was written by a newer Δx (format {version}): update deltax")
            if version < VERSION:
                with self.writing():
                    for statement in _SCHEMA.strip().split(";\n"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA user_version={VERSION}")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(
                f"cannot open the library {self.path.name} ({error}): set DELTAX_HOME to a folder of yours"
            ) from None

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self, keep: bool = True) -> Iterator[None]:
        """One transaction; nested ones join it. keep=False undoes all of it at the end."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT" if keep else "ROLLBACK")

    # Files in.

    def digest(self, path: str) -> str | None:
        row = self.db.execute("SELECT digest FROM sources WHERE path=?", (path,)).fetchone()
        return row[0] if row else None

    def paths_of(self, digest: str) -> list[str]:
        return [row[0] for row in self.db.execute("SELECT path FROM sources WHERE digest=?", (digest,))]

    def rename(self, old: str, new: str) -> None:
        """A file that moved keeps its entries and their edits."""
        with self.writing():
            self.db.execute("UPDATE sources SET path=? WHERE path=?", (new, old))

    def embeds(self) -> dict[str, list[tuple[int, str]]]:
        rows = self.db.execute("SELECT path, embeds FROM sources WHERE embeds != '[]'")
        return {path: [tuple(e) for e in json.loads(embeds)] for path, embeds in rows}

    def put(self, reading: Reading, digest: str, embeds: list[tuple[int, str]] = ()) -> Changes:
        """Take in what a file says now. Entries that were there before keep their number and their edits."""
        with self.writing():
            row = self.db.execute("SELECT id, digest FROM sources WHERE path=?", (reading.path,)).fetchone()
            front = json.dumps(reading.front, ensure_ascii=False)
            if row is None:
                values = (reading.path, digest, front, json.dumps(embeds))
                source = self.db.execute(
                    "INSERT INTO sources (path, digest, front, embeds) VALUES (?,?,?,?)", values
                ).lastrowid
                changes = self._add(source, reading)
            else:
                source = row[0]
                changes = self._update(source, reading)
                self.db.execute(
                    "UPDATE sources SET digest=?, front=?, embeds=? WHERE id=?",
                    (digest, front, json.dumps(embeds), source),
                )
                self.db.execute("DELETE FROM remarks WHERE source=?", (source,))
            self.db.executemany(
                "INSERT INTO remarks VALUES (?,?,?,?,?)",
                [(source, r.line, r.end, r.reason, r.text) for r in reading.remarks],
            )
        return changes

    def _add(self, source: int, reading: Reading) -> Changes:
        for position, entry in enumerate(reading.entries):
            self._insert(source, position, entry)
        return Changes(added=len(reading.entries))

    def _update(self, source: int, reading: Reading) -> Changes:
        rows = self.db.execute(
            "SELECT id, data, edits, origin, position, gone FROM entries WHERE source=? ORDER BY gone, position",
            (source,),
        ).fetchall()
        old = [json.loads(row[1]) for row in rows]
        new = [flat(entry) for entry in reading.entries]
        pairs = match.pair(old, new)
        added = updated = unchanged = 0
        kept: list[tuple[int, str]] = []
        for j, entry in enumerate(reading.entries):
            if j not in pairs:
                self._insert(source, j, entry)
                added += 1
                continue
            number, data, edits, origin, position, gone = rows[pairs[j]]
            changed = old[pairs[j]] != new[j]
            if changed:
                edited = json.loads(edits)
                kept += [(entry.origin.line, field) for field in edits_.conflicts(edited, json.loads(data), new[j])]
            updated, unchanged = updated + changed, unchanged + (not changed)
            if changed or gone or json.loads(origin) != _place(entry.origin) or position != j:
                self._write(number, new[j], json.loads(edits), entry.origin, j)
        removed = [row for i, row in enumerate(rows) if i not in set(pairs.values())]
        for number, _, edits, *_ in removed:
            if edits == "{}":
                self._delete(number)
            else:
                self.db.execute("UPDATE entries SET gone=1 WHERE id=?", (number,))
        return Changes(added, updated, len(removed), unchanged, tuple(kept))

    def add(self, entry: Entry) -> int:
        """An entry that is in no file; its number."""
        with self.writing():
            number = self._insert(None, 0, entry)
            self.regroup()
        return number

    def _insert(self, source: int | None, position: int, entry: Entry) -> int:
        data = flat(entry)
        columns = (source, position, *_columns(data, {}, entry.origin))
        cursor = self.db.execute(
            "INSERT INTO entries (source, position, work, data, edits, origin, keys, norm, state)"
            " VALUES (?, ?, 0, ?, ?, ?, ?, ?, ?)",
            columns,
        )
        self._index(cursor.lastrowid, data)
        return cursor.lastrowid

    def _write(self, number: int, data: dict, edits: dict, origin: Origin, position: int) -> None:
        self.db.execute(
            "UPDATE entries SET data=?, edits=?, origin=?, keys=?, norm=?, state=?, position=?, gone=0 WHERE id=?",
            (*_columns(data, edits, origin), position, number),
        )
        self.db.execute("DELETE FROM words WHERE rowid=?", (number,))
        self._index(number, edits_.apply(data, edits))

    def _index(self, number: int, seen: dict) -> None:
        self.db.execute(
            "INSERT INTO words (rowid, title, name, text, tags) VALUES (?,?,?,?,?)",
            (number, seen["title"], seen["name"], seen["text"], " ".join(seen["tags"])),
        )

    def _delete(self, number: int) -> None:
        self.db.execute("DELETE FROM entries WHERE id=?", (number,))
        self.db.execute("DELETE FROM words WHERE rowid=?", (number,))

    def regroup(self) -> None:
        """Find again which entries are one work. Done once after files are taken in."""
        rows = self.db.execute("SELECT id, keys, norm, work FROM entries ORDER BY id").fetchall()
        found = works.group(
            (number, () if keys == "several" else tuple(keys.split()), norm, keys == "several")
            for number, keys, norm, _ in rows
        )
        changed = [(found[number], number) for number, _, _, work in rows if found[number] != work]
        with self.writing():
            self.db.executemany("UPDATE entries SET work=? WHERE id=?", changed)

    # The reader's edits.

    def edit(self, number: int, edits: dict[str, Any]) -> Item:
        """Lay edits over an entry (edits.FIELDS); they survive every import."""
        edits_.check(edits)
        with self.writing():
            row = self.db.execute("SELECT data, edits, origin, position FROM entries WHERE id=?", (number,)).fetchone()
            if row is None:
                raise UserError(f"there is no entry {number} ('dx notes list' shows all)")
            merged = edits_.merge(json.loads(row[1]), edits)
            self._write(number, json.loads(row[0]), merged, Origin(**json.loads(row[2])), row[3])
            if "title" in edits:
                self.regroup()
        return self.item(number)

    def settle(self, number: int, written: Iterable[str]) -> None:
        """Drop these kinds of edits (edits.FIELDS): the entry's file says them now."""
        with self.writing():
            row = self.db.execute("SELECT data, edits, origin, position FROM entries WHERE id=?", (number,)).fetchone()
            kept = {key: value for key, value in json.loads(row[1]).items() if key not in set(written)}
            self._write(number, json.loads(row[0]), kept, Origin(**json.loads(row[2])), row[3])

    def in_file(self, number: int) -> Entry:
        """The entry as its file has it, without the edits made here."""
        row = self.db.execute("SELECT data FROM entries WHERE id=?", (number,)).fetchone()
        return unflat(json.loads(row[0]), self.item(number).entry.origin)

    # What is there.

    def items(self, where: str = "", values: Iterable[Any] = ()) -> list[Item]:
        """Entries in the order of their files. `where` is SQL over the table entries, aliased e."""
        query = (
            "SELECT e.id, e.work, e.data, e.edits, e.origin, e.gone, s.path"
            " FROM entries e LEFT JOIN sources s ON s.id=e.source"
        )
        rows = self.db.execute(
            f"{query} {f'WHERE {where}' if where else ''} ORDER BY s.id, e.position, e.id", tuple(values)
        )
        return [_item(row) for row in rows]

    def item(self, number: int) -> Item:
        found = self.items("e.id=?", (number,)) if number.bit_length() < 64 else []
        if not found:
            raise UserError(f"there is no entry {number} ('dx notes list' shows all)")
        return found[0]

    def work(self, number: int) -> list[Item]:
        """Every entry of a work."""
        return self.items("e.work=?", (number,))

    def by_identifier(self, identifier: Identifier) -> list[Item]:
        return self.items("(' '||e.keys||' ') LIKE ?", (f"% {identifier.key} %",))

    def search(self, query: str, limit: int = 20) -> list[Item]:
        """Best matches first (BM25 over title, name, text and tags). Every word must occur, the last one as a
        beginning; "quoted words" stand together. Where no entry has every word, some suffice."""
        for joint in (" AND ", " OR "):
            expression = _expression(query, joint)
            if not expression:
                return []
            rows = self.db.execute(
                f"SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, {_WEIGHTS}) LIMIT ?",
                (expression, limit),
            ).fetchall()
            if rows:
                order = {row[0]: place for place, row in enumerate(rows)}
                found = self.items(f"e.id IN ({','.join('?' * len(rows))})", [row[0] for row in rows])
                return sorted(found, key=lambda item: order[item.id])
        return []

    def remarks(self, path: str | None = None) -> list[Remark]:
        """What was not understood, by file and line."""
        query = "SELECT s.path, r.line, r.last, r.reason, r.text FROM remarks r JOIN sources s ON s.id=r.source"
        rows = self.db.execute(
            f"{query} {'WHERE s.path=?' if path else ''} ORDER BY s.id, r.line", (path,) if path else ()
        )
        return [Remark(*row) for row in rows]

    def sources(self) -> dict[str, dict[str, Any]]:
        """Every file taken in, with its front matter."""
        return {
            path: json.loads(front) for path, front in self.db.execute("SELECT path, front FROM sources ORDER BY id")
        }

    def count(self) -> tuple[int, int]:
        """(entries, works)."""
        return self.db.execute("SELECT COUNT(*), COUNT(DISTINCT work) FROM entries").fetchone()


def _columns(data: dict[str, Any], edits: dict[str, Any], origin: Origin) -> tuple[str, ...]:
    """data, edits, origin, keys, norm, state: an entry as the table has it."""
    seen = edits_.apply(data, edits) if edits else data
    ids = [Identifier(*i) for i in seen["ids"]]
    identity = Reference(seen["title"], ids=tuple(ids)).identity
    keys = " ".join(identity) if identity or not ids else "several"
    texts = (json.dumps(value, ensure_ascii=False) for value in (data, edits, _place(origin)))
    return (*texts, keys, normal_title(seen["title"]), seen["state"])


def _place(origin: Origin) -> dict[str, Any]:
    return {key: value for key, value in vars(origin).items() if key not in ("path", "section")}


def _item(row: tuple) -> Item:
    number, work, data, edits, place, gone, path = row
    edited = json.loads(edits)
    values = edits_.apply(json.loads(data), edited)
    return Item(number, work, unflat(values, Origin(path=path or "", **json.loads(place))), edited, bool(gone))


def _expression(query: str, joint: str) -> str:
    """An FTS5 expression of quoted strings only: no character of a query is syntax."""
    words = [phrase or word for phrase, word in re.findall(r'"([^"]+)"|([^\s"]+)', query[:1000])]
    words = [word for word in words if any(c.isalnum() for c in word)][:32]
    quoted = ['"' + word.replace('"', "") + '"' for word in words]
    if quoted and not query.rstrip().endswith('"'):
        quoted[-1] += "*"
    return joint.join(quoted)
