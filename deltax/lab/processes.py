"""The engines of one machine: worker processes with a thread each, or no other process at all."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from deltax.errors import DataWarning, UserError
from deltax.lab import warm
from deltax.lab.lease import Worker
from deltax.lab.store import Store
from deltax.lab.worker import UNDER_WAY, Message, Tell, work
from deltax.signals import ignoring_sigint
from deltax.train.job import Job
from deltax.train.machine import core_each, settle

GRACE = 10.0  # seconds a worker gets at most to finish its step and save its run
READY = "ready"


@dataclass
class _Hired:
    """A worker process: our end of its pipe, and what it is at."""

    process: Any
    pipe: connection.Connection
    worker: Worker
    core: int | None
    ready: bool = False
    job: Job | None = None


class Processes:
    """Worker processes of this machine, each at one run, each with one thread. A `Pool`.

    They save their runs and end when they are told to (SIGTERM), and when the process that started them is gone.
    """

    def __init__(self, store: Store, workers: int, tell: Tell, keep_weights: bool):
        warm.guard()
        if workers < 1:
            raise UserError(f"runs need at least 1 worker, not {workers}: give --workers 1 or more")
        self.store, self.tell, self.keep_weights = store, tell, keep_weights
        self.hired: list[_Hired] = []
        self.cores = core_each(workers)

    def __enter__(self) -> "Processes":
        self.hired = [self._hire(core) for core in self.cores]
        return self

    def __exit__(self, *error: Any) -> None:
        for hired in self.hired:
            hired.pipe.close()
            if hired.job:
                hired.process.terminate()
        try:
            for hired in self.hired:
                hired.process.join(GRACE)
        finally:
            for hired in self.hired:
                if hired.process.is_alive():
                    hired.process.kill()
                hired.process.join()

    def idle(self) -> Worker | None:
        return next((hired.worker for hired in self.hired if not hired.job), None)

    def start(self, worker: Worker, job: Job) -> None:
        hired = next(hired for hired in self.hired if hired.worker == worker)
        hired.job = job
        with suppress(OSError):  # it died, as the next poll will find
            hired.pipe.send(job)

    def poll(self, seconds: float) -> None:
        for ready in connection.wait([hired.pipe for hired in self.hired], seconds):
            hired = next(hired for hired in self.hired if hired.pipe is ready)
            message = None
            with suppress(EOFError, ConnectionResetError):
                message = hired.pipe.recv()
            if message is None:
                self._bury(hired)
                continue
            if message == READY:
                hired.ready = True
                continue
            if message.kind not in UNDER_WAY:
                hired.job = None
            self.tell(message)

    def _hire(self, core: int | None) -> _Hired:
        context = warm.context()
        ours, theirs = context.Pipe()
        args = (theirs, self.store.folder, core, self.keep_weights)
        hired = context.Process(target=_serve, args=args, name="deltax worker", daemon=True)
        with ignoring_sigint():
            hired.start()
        theirs.close()
        return _Hired(hired, ours, Worker.here(hired.pid), core)

    def _bury(self, hired: _Hired) -> None:
        hired.process.join(GRACE)
        code = hired.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
        if code == warm.UNGUARDED:
            raise UserError("this script runs itself again in every worker: call it under if __name__ == '__main__':")
        if not hired.ready:
            raise UserError(f"a worker was {how} before it began: see its own words above, or use --engine inline")
        hired.pipe.close()
        self.hired[self.hired.index(hired)] = self._hire(hired.core)
        if hired.job:
            hint = ", often for want of memory: try fewer --workers" if code == -signal.SIGKILL else ""
            self.tell(Message("died", hired.job.id, text=f"its worker was {how}{hint}"))


class Inline:
    """This process, one run after the other. A `Pool`."""

    def __init__(self, store: Store, threads: int, tell: Tell, keep_weights: bool):
        self.store, self.threads, self.tell, self.keep_weights = store, threads, tell, keep_weights
        self.worker = Worker.here()
        self.job: Job | None = None

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def idle(self) -> Worker | None:
        return None if self.job else self.worker

    def start(self, worker: Worker, job: Job) -> None:
        self.job = job

    def poll(self, seconds: float) -> None:
        if not self.job:
            threading.Event().wait(seconds)
            return
        job, self.job = self.job, None
        with _interrupts() as interrupted:
            work(job, self.store, self.worker, self.tell, interrupted.is_set, self.keep_weights, self.threads)
        if interrupted.is_set():
            raise KeyboardInterrupt


def _serve(pipe: connection.Connection, folder: Path, core: int | None, keep_weights: bool) -> None:
    """What a worker process does: the runs it is handed, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    told, busy = threading.Event(), threading.Event()

    def leave(*_: Any) -> None:
        told.set()
        if not busy.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    settle(core)
    stop = lambda: told.is_set() or pipe.poll()  # while we are at work nothing comes but its end

    def tell(message: Message | str) -> None:
        with suppress(OSError):  # the parent is gone: `stop` will say so
            pipe.send(message)

    warnings.simplefilter("ignore", DataWarning)  # the parent has read the same data and said it
    store = Store(folder)
    tell(READY)
    while not told.is_set():
        try:
            job = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        busy.set()
        work(job, store, Worker.here(), tell, stop, keep_weights)
        busy.clear()
    os._exit(0)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which does nothing else meanwhile; outside the main thread never."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
