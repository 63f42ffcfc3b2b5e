"""The store of runs: what was trained is never trained again, by whatever process.

A folder with `runs.sqlite` (in WAL mode, so that many processes may use it), `checkpoints/` of unfinished runs and
`weights/` of finished ones. A run's key is its job's id, which names its whole content.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import numpy as safetensors

from deltax import sqlite
from deltax.errors import StoreError, UserError, nearest
from deltax.home import home
from deltax.lab.lease import Worker

if TYPE_CHECKING:
    from deltax.train.job import Job

VERSION = 1

_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    job TEXT NOT NULL,                               -- Job.to_json
    host TEXT, pid INTEGER, born INTEGER, beat REAL, -- the lease of the worker that trains it
    step INTEGER, loss REAL, speed REAL,             -- how far it is, speed in tokens per second
    finished REAL,                                   -- when, NULL until then
    score REAL, diverged INTEGER, tokens INTEGER, seconds REAL,
    facts TEXT,                                      -- metrics, losses, environment
    arrays BLOB                                      -- values, weights, clusters: safetensors
);
CREATE TABLE records (
    kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, changed REAL NOT NULL,
    PRIMARY KEY (kind, key)
);
"""


@dataclass(frozen=True)
class Result:
    """A finished run: how it ended on held-out data, and how it got there.

    score               held-out, in the task's unit, lower is better; None when the run diverged
    values (N,)         the score of each held-out example, `weights` (N,) what it counts for, `clusters` (N,) the
                        document it comes from; empty when the run diverged
    metrics             further figures of the task by name
    losses              (step, nats) at every training step
    tokens, seconds     spent on training, over all its interruptions
    environment         machine and versions
    weights_file        the final weights, where they were kept
    pictures            captions with SVG: what it makes of held-out pictures, of a run that reports show
    """

    job: "Job"
    score: float | None
    values: np.ndarray
    weights: np.ndarray
    clusters: np.ndarray
    metrics: dict[str, float]
    losses: list[tuple[int, float]]
    tokens: int
    seconds: float
    diverged: bool
    environment: dict[str, Any]
    weights_file: Path | None = None
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A run as `dx runs` lists it. `state` is "finished", "diverged", "running" or "interrupted".

    `loss` in nats and `speed` in tokens per second are the last that an unfinished run reported.
    """

    id: str
    title: str
    seed: int
    steps: int
    lr_scale: float
    state: str
    step: int
    score: float | None
    tokens: int | None
    seconds: float | None
    finished: datetime | None
    weights_file: Path | None
    loss: float | None = None
    speed: float | None = None


class Store:
    """The runs in a folder: the one given (`--store`), else $DELTAX_HOME/runs, else ~/.local/share/deltax/runs.

    A store on a read-only disk can be read. Raises StoreError for a folder that cannot be used, a disk that is full, a
    damaged database, and one that a later deltax wrote; none of these changes what is there.
    """

    def __init__(self, path: Path | str | None = None):
        self.folder = Path(path).expanduser() if path else home() / "runs"
        self.checkpoints, self.weights = self.folder / "checkpoints", self.folder / "weights"
        self.file = self.folder / "runs.sqlite"
        self._lock = threading.RLock()
        with self._said():
            self._open()

    def get(self, job: "Job") -> Result | None:
        """The finished run of this job, if there is one."""
        row = self._one("SELECT * FROM runs WHERE id = ? AND finished IS NOT NULL", job.id)
        return self._result(row, job) if row else None

    def put(self, result: Result) -> None:
        """Keep a finished run, give up its lease and delete its checkpoint."""
        arrays = {name: np.asarray(getattr(result, name)) for name in ("values", "weights", "clusters")}
        facts = {"metrics": result.metrics, "losses": result.losses, "environment": result.environment}
        facts |= {"pictures": result.pictures} if result.pictures else {}
        self._write(
            """INSERT INTO runs (id, title, job, step, finished, score, diverged, tokens, seconds, facts, arrays)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET host = NULL, pid = NULL, born = NULL, beat = NULL, step = excluded.step,
            finished = excluded.finished, score = excluded.score, diverged = excluded.diverged,
            tokens = excluded.tokens, seconds = excluded.seconds, facts = excluded.facts, arrays = excluded.arrays""",
            *(
                *_named(result.job),
                len(result.losses),
                time.time(),
                result.score,
                result.diverged,
                result.tokens,
                result.seconds,
            ),
            *(json.dumps(facts), safetensors.save(arrays)),
        )
        with suppress(OSError):
            self.checkpoint_of(result.job).unlink(missing_ok=True)

    def claim(self, job: "Job", worker: Worker) -> bool:
        """Take the lease of a run, unless another living worker has it."""
        with self._transaction():
            row = self._one("SELECT host, pid, born, beat FROM runs WHERE id = ? AND host IS NOT NULL", job.id)
            if row:
                holder = Worker(row["host"], row["pid"], row["born"])
                if holder != worker and holder.alive(row["beat"]):
                    return False
            self._db.execute(
                """INSERT INTO runs (id, title, job, host, pid, born, beat) VALUES (?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (id) DO UPDATE SET host = excluded.host, pid = excluded.pid, born = excluded.born,
                beat = excluded.beat""",
                (*_named(job), worker.host, worker.pid, worker.born, time.time()),
            )
            return True

    def heartbeat(self, job: "Job", worker: Worker, *at: float) -> bool:
        """A sign of life, `at` a step, loss and tokens per second; False when the lease has gone to another worker."""
        step, loss, speed = at or (None, None, None)
        changed = self._write(
            """UPDATE runs SET beat = ?, step = coalesce(?, step), loss = coalesce(?, loss),
            speed = coalesce(?, speed) WHERE id = ? AND host = ? AND pid = ? AND born = ?""",
            *(time.time(), step, loss, speed, job.id, worker.host, worker.pid, worker.born),
        )
        return changed == 1

    def release(self, job: "Job", worker: Worker) -> None:
        """Give up the lease of a run, finished or not; one that never took a step is forgotten."""
        self._write(
            "DELETE FROM runs WHERE id = ? AND host = ? AND pid = ? AND born = ? AND finished IS NULL AND step IS NULL",
            *(job.id, worker.host, worker.pid, worker.born),
        )
        self._write(
            "UPDATE runs SET host = NULL, pid = NULL, born = NULL WHERE id = ? AND host = ? AND pid = ? AND born = ?",
            *(job.id, worker.host, worker.pid, worker.born),
        )

    def progress(self, job: "Job") -> tuple[int, int, float, float] | None:
        """(step, total steps, loss in nats, tokens per second) of an unfinished run; None before its first step."""
        row = self._one(
            "SELECT step, loss, speed FROM runs WHERE id = ? AND finished IS NULL AND loss NOT NULL", job.id
        )
        return (row["step"], job.steps, row["loss"], row["speed"]) if row else None

    def checkpoint_of(self, job: "Job") -> Path:
        return self.checkpoints / f"{job.id}.safetensors"

    def weights_of(self, job: "Job") -> Path:
        return self.weights / f"{job.id}.safetensors"

    def start_of(self, digest: str) -> Path:
        """Weights that runs start from, named by their content: `Job.start`."""
        return self.folder / "starts" / f"{digest}.safetensors"

    def runs(self, title: str = "", limit: int | None = None) -> list[Line]:
        """Runs whose title contains `title`, the latest first. Loads no torch."""
        rows = self._all(
            """SELECT * FROM runs WHERE instr(title, ?) > 0
            ORDER BY coalesce(finished, beat, 0) DESC, rowid DESC LIMIT ?""",
            *(title, -1 if limit is None else limit),
        )
        return [self._line(row) for row in rows]

    def find(self, prefix: str) -> Result:
        """The finished run whose id begins so. Raises UserError when none or several do."""
        from deltax.train.job import Job

        rows = self._all("SELECT * FROM runs WHERE finished IS NOT NULL AND substr(id, 1, ?) = ?", len(prefix), prefix)
        if len(rows) == 1:
            return self._result(rows[0], Job.from_json(json.loads(rows[0]["job"])))
        if rows:
            some = ", ".join(row["id"] for row in rows[:3])
            raise UserError(f"{len(rows)} runs begin with {prefix!r} ({some} ...); give more of the id")
        known = [row["id"] for row in self._all("SELECT id FROM runs WHERE finished IS NOT NULL")]
        close = nearest(prefix, {id[: len(prefix)] for id in known} | set(known))
        raise UserError(f"there is no finished run {prefix!r}{close or '; '}{'' if close else 'dx runs lists them'}")

    def remember(self, kind: str, key: str, value: Any) -> None:
        """Keep anything that JSON can hold, such as a calibration or a comparison; an earlier one is replaced."""
        self._write("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", kind, key, json.dumps(value), time.time())

    def recall(self, kind: str, key: str) -> Any | None:
        row = self._one("SELECT value FROM records WHERE kind = ? AND key = ?", kind, key)
        return json.loads(row["value"]) if row else None

    def records(self, kind: str) -> dict[str, Any]:
        """All that was remembered of a kind by key, the oldest first."""
        rows = self._all("SELECT key, value FROM records WHERE kind = ? ORDER BY changed, rowid", kind)
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def forget(self, kind: str, key: str) -> None:
        self._write("DELETE FROM records WHERE kind = ? AND key = ?", kind, key)

    @contextmanager
    def announced(self, kind: str, value: Any) -> Iterator[None]:
        """Tell whoever asks `going_on` of something that this process does, for as long as it does it.

        A store that cannot be written keeps it to itself.
        """
        me = Worker.here()
        key = f"{me.pid} {time.time_ns()} {me.host}"
        with suppress(StoreError):
            for left in [k for k, v in self.records(kind).items() if not self._lives(v)]:
                self.forget(kind, left)
            self.remember(kind, key, {"worker": vars(me), "at": time.time(), "value": value})
        try:
            yield
        finally:
            with suppress(StoreError):
                self.forget(kind, key)

    def going_on(self, kind: str) -> list[tuple[float, Any]]:
        """(since when, what) of everything announced by a process that lives, the oldest first."""
        return [(v["at"], v["value"]) for v in self.records(kind).values() if self._lives(v)]

    def _lives(self, announced: dict[str, Any]) -> bool:
        """A process of another machine is believed while one that trains there is."""
        worker = Worker(**announced["worker"])
        row = self._one("SELECT max(beat) AS last FROM runs WHERE host = ?", worker.host)
        return worker.alive(max(announced["at"], row["last"] or 0.0))

    def check_writable(self) -> None:
        """Raises StoreError for a store that can only be read."""
        with self._transaction():
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite.opened(f"{self.file.absolute().as_uri()}?mode=rwc", uri=True, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            if self._db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                raise sqlite3.OperationalError("this disk does not support shared files")
            with self._transaction():
                if self._version() == 0:
                    for statement in _SCHEMA.strip().rstrip(";").split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {VERSION}")
        except (sqlite3.OperationalError, OSError, StoreError):
            if not self.file.exists() or (os.access(self.file, os.W_OK) and os.access(self.folder, os.W_OK)):
                raise
            self._read_only()
        if self._version() > VERSION:
            raise StoreError(f"{self.file} was written by a later deltax; upgrade this one, or choose another --store")

    def _read_only(self) -> None:
        uri = self.file.absolute().as_uri()
        try:
            self._db = _connect(f"{uri}?mode=ro")
            self._version()
        except sqlite3.OperationalError:  # a database in WAL mode wants to write even to be read, unless told so
            self._db = _connect(f"{uri}?immutable=1")

    def _version(self) -> int:
        return self._db.execute("PRAGMA user_version").fetchone()[0]

    def _one(self, statement: str, *values: Any) -> sqlite3.Row | None:
        with self._lock, self._said():
            return self._db.execute(statement, values).fetchone()

    def _all(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock, self._said():
            return self._db.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: Any) -> int:
        """How many rows it changed."""
        with self._transaction():
            return self._db.execute(statement, values).rowcount

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._said():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What SQLite and the system report, as a sentence that names the fix."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(self._sentence(error)) from None

    def _sentence(self, error: Exception) -> str:
        reason = str(getattr(error, "strerror", None) or error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or reason == "No space left on device":
            return f"the disk of the store {self.folder} is full: free some space, or choose another --store"
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return f"{self.file} is damaged ({reason}): nothing was changed; move it aside or choose another --store"
        if code == sqlite3.SQLITE_READONLY or reason in ("Permission denied", "Read-only file system"):
            return f"the store {self.folder} cannot be written: make it writable or choose another --store"
        return f"the store {self.folder} cannot be used ({reason}): check its disk or choose another --store"

    def _result(self, row: sqlite3.Row, job: "Job") -> Result:
        facts, arrays = json.loads(row["facts"]), safetensors.load(row["arrays"])
        weights_file = self.weights / f"{row['id']}.safetensors"
        return Result(
            job=job,
            score=row["score"],
            **arrays,
            metrics=facts["metrics"],
            losses=[(step, nats) for step, nats in facts["losses"]],
            tokens=row["tokens"],
            seconds=row["seconds"],
            diverged=bool(row["diverged"]),
            environment=facts["environment"],
            weights_file=weights_file if weights_file.exists() else None,
            pictures=facts.get("pictures", {}),
        )

    def _line(self, row: sqlite3.Row) -> Line:
        job = json.loads(row["job"])
        running = row["host"] is not None and Worker(row["host"], row["pid"], row["born"]).alive(row["beat"])
        ended = "diverged" if row["diverged"] else "finished"
        weights_file = self.weights / f"{row['id']}.safetensors"
        return Line(
            *(row["id"], row["title"], job["seed"], job["steps"], job.get("lr_scale", job.get("rate"))),
            state=ended if row["finished"] else "running" if running else "interrupted",
            step=row["step"] or 0,
            score=row["score"],
            tokens=row["tokens"],
            seconds=row["seconds"],
            finished=datetime.fromtimestamp(row["finished"], UTC) if row["finished"] else None,
            weights_file=weights_file if weights_file.exists() else None,
            loss=None if row["finished"] else row["loss"],
            speed=None if row["finished"] else row["speed"],
        )


def _named(job: "Job") -> tuple[str, str, str]:
    return job.id, job.recipe.title, json.dumps(job.to_json())


def _connect(uri: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db
