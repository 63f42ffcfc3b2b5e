"""How every SQLite file that several processes use at once is opened."""

import sqlite3
import time
from typing import Any

_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def opened(database: str, *, patience: float = 30.0, **options: Any) -> sqlite3.Connection:
    """A connection in WAL mode where the disk supports it; a transaction begins where the caller says so.

    SQLite's timeout does not hold for the change to WAL: where another process opens a new file at the same moment,
    one of the two gets "database is locked" at once. Here that is tried again for `patience` seconds.

    Raises sqlite3.Error for a file that cannot be opened, or stays locked.
    """
    db = sqlite3.connect(database, timeout=patience, isolation_level=None, **options)
    deadline = time.monotonic() + patience
    try:
        while not _in_wal(db):
            if time.monotonic() > deadline:
                raise sqlite3.OperationalError("database is locked")
            time.sleep(0.005)
        db.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def _in_wal(db: sqlite3.Connection) -> bool:
    """Whether the mode was set, or refused for good; False where another process is in the way."""
    try:
        db.execute("PRAGMA journal_mode=WAL").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _BUSY:
            raise
        return False
    return True
