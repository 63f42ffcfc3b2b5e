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
from deltax.signals import deaf
from deltax.train.job import Job
from deltax.train.machine import core_each, settle

GRACE = 10.0  # seconds a worker gets at most to finish its step and save its run
READY = "ready"


@dataclass
class _Hand:
    """A worker process: our end of its pipe, and what it is at."""

    process: Any
    pipe: connection.Connection
    worker: Worker
    core: int | None
    ready: bool = False
    job: Job | None = None


class Processes:
    """Worker processes of this machine, each at one run, each with one thread. A `Crew`.

    They save their runs and end when they are told to (SIGTERM), and when the process that started them is gone.
    """

    def __init__(self, store: Store, workers: int, tell: Tell, keep_weights: bool):
        warm.guard()
        if workers < 1:
            raise UserError(f"runs need at least 1 worker, not {workers}: give --workers 1 or more")
        self.store, self.tell, self.keep_weights = store, tell, keep_weights
        self.hands: list[_Hand] = []
        self.cores = core_each(workers)

    def __enter__(self) -> "Processes":
        self.hands = [self._hire(core) for core in self.cores]
        return self

    def __exit__(self, *error: Any) -> None:
        for hand in self.hands:
            hand.pipe.close()
            if hand.job:
                hand.process.terminate()
        try:
            for hand in self.hands:
                hand.process.join(GRACE)
        finally:
            for hand in self.hands:
                if hand.process.is_alive():
                    hand.process.kill()
                hand.process.join()

    def idle(self) -> Worker | None:
        return next((hand.worker for hand in self.hands if not hand.job), None)

    def start(self, worker: Worker, job: Job) -> None:
        hand = next(hand for hand in self.hands if hand.worker == worker)
        hand.job = job
        with suppress(OSError):  # it died, as the next poll will find
            hand.pipe.send(job)

    def poll(self, seconds: float) -> None:
        for ready in connection.wait([hand.pipe for hand in self.hands], seconds):
            hand = next(hand for hand in self.hands if hand.pipe is ready)
            message = None
            with suppress(EOFError, ConnectionResetError):
                message = hand.pipe.recv()
            if message is None:
                self._bury(hand)
                continue
            if message == READY:
                hand.ready = True
                continue
            if message.kind not in UNDER_WAY:
                hand.job = None
            self.tell(message)

    def _hire(self, core: int | None) -> _Hand:
        context = warm.context()
        ours, theirs = context.Pipe()
        args = (theirs, self.store.folder, core, self.keep_weights)
        hired = context.Process(target=_serve, args=args, name="deltax worker", daemon=True)
        with deaf():
            hired.start()
        theirs.close()
        return _Hand(hired, ours, Worker.here(hired.pid), core)

    def _bury(self, hand: _Hand) -> None:
        hand.process.join(GRACE)
        code = hand.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
        if code == warm.UNGUARDED:
            raise UserError("this script runs itself again in every worker: call it under if __name__ == '__main__':")
        if not hand.ready:
            raise UserError(f"a worker was {how} before it began: see its own words above, or use --engine inline")
        hand.pipe.close()
        self.hands[self.hands.index(hand)] = self._hire(hand.core)
        if hand.job:
            hint = ", often for want of memory: try fewer --workers" if code == -signal.SIGKILL else ""
            self.tell(Message("died", hand.job.id, text=f"its worker was {how}{hint}"))


class Inline:
    """This process, one run after the other. A `Crew`."""

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
