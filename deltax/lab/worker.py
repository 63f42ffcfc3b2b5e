"""One run, from its claim to its result in the store, wherever a worker is."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deltax import __version__
from deltax.errors import StoreError, UserError
from deltax.lab.lease import Worker
from deltax.lab.store import Result, Store
from deltax.train import checkpoint
from deltax.train.job import Job, code_version, task_of
from deltax.train.loop import Outcome, Progress, Stop, train
from deltax.train.machine import Machine

TELL_EVERY = 0.5
BEAT_EVERY = 10.0
FIRST_PAIR = 1  # the first of `deltax.lab.plan.pair_seeds`, whose runs are drawn
UNDER_WAY = ("started", "step", "restarted")


@dataclass(frozen=True)
class Message:
    """What a worker says of a run; `kind` is one of `deltax.lab.engine.Event`, or "stopped" or "died".

    disk  whether a failure is the disk's, so that nothing else can be stored either
    """

    kind: str
    id: str
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    text: str = ""
    disk: bool = False


Tell = Callable[[Message], None]


def work(
    job: Job,
    store: Store,
    worker: Worker,
    tell: Tell,
    stop: Callable[[], bool],
    keep_weights: bool,
    threads: int = 1,
) -> None:
    """Train a claimed job and put its result into the store; tell how it goes and how it ended, errors included.

    stop is asked after every step. A checkpoint that cannot be read is set aside, and its run starts anew.
    """
    try:
        tell(Message("started", job.id))
        aside = _set_damaged_aside(store, job)
        if aside:
            tell(Message("restarted", job.id, text=aside))
        start = checkpoint.load(store.start_of(job.start))[0] if job.start else None
        pace = _Pace(job, store, worker, tell, stop)
        machine = Machine.here(threads=threads, precision=job.dtype)
        with _beating(job, store, worker):
            outcome = train(job, machine, weights=start, save_to=store.checkpoint_of(job), on_step=pace)
        if keep_weights and not outcome.diverged:
            checkpoint.save(store.weights_of(job), outcome.model.state_dict(), {"id": job.id})
        result = result_of(job, outcome, machine)
        store.put(result)
        if job.seed == FIRST_PAIR and not outcome.diverged and (drawn := _drawn(job, outcome)):
            store.put(replace(result, pictures=drawn))
        tell(Message("finished", job.id, outcome.progress.step, losses=pace.untold(outcome.progress)))
    except Stop:
        _release(job, store, worker)
        tell(Message("stopped", job.id))
    except UserError as error:
        _release(job, store, worker)
        tell(Message("failed", job.id, text=str(error), disk=isinstance(error, StoreError)))
    except Exception as error:
        _release(job, store, worker)
        tell(Message("failed", job.id, text=_reported(error, job, store)))


def result_of(job: Job, outcome: Outcome, machine: Machine) -> Result:
    evaluation, progress, none = outcome.evaluation, outcome.progress, np.empty(0)
    return Result(
        job=job,
        score=evaluation.score if evaluation else None,
        values=evaluation.values if evaluation else none,
        weights=evaluation.weights if evaluation else none,
        clusters=evaluation.clusters if evaluation else none,
        metrics=evaluation.metrics if evaluation else {},
        losses=progress.losses,
        tokens=progress.tokens,
        seconds=progress.seconds,
        diverged=outcome.diverged,
        environment={
            **machine.describe(),
            "deltax": __version__,
            "code": code_version(job.recipe),
            **({"pieces": outcome.pieces} if outcome.pieces else {}),
        },
    )


def _drawn(job: Job, outcome: Outcome) -> dict[str, str]:
    """The pictures of a run that reports show."""
    task = task_of(job.recipe)
    if "channels" not in task.task_spec:
        return {}
    from deltax.lab.pictures import pictures  # loads matplotlib

    return pictures(job.recipe, task, outcome.model)


class _Pace:
    """Told of every step; tells of it, and beats, at most twice a second."""

    def __init__(self, job: Job, store: Store, worker: Worker, tell: Tell, stop: Callable[[], bool]):
        self.job, self.store, self.worker, self.tell, self.stop = job, store, worker, tell, stop
        self.told, self.at = 0, 0.0
        self.begun: tuple[float, int] | None = None

    def __call__(self, progress: Progress) -> None:
        if self.stop():
            raise Stop
        now = time.monotonic()
        self.begun = self.begun or (now, progress.tokens)
        if now - self.at < TELL_EVERY:
            return
        self.at = now
        loss, elapsed = progress.losses[-1][1], now - self.begun[0]
        speed = (
            (progress.tokens - self.begun[1]) / elapsed if elapsed else progress.tokens / max(progress.seconds, 1e-9)
        )
        if not self.store.heartbeat(self.job, self.worker, progress.step, loss, speed):
            raise Stop  # another worker took the run over while this one slept
        self.tell(Message("step", self.job.id, progress.step, loss, speed, self.untold(progress)))

    def untold(self, progress: Progress) -> tuple[tuple[int, float], ...]:
        new = tuple(progress.losses[self.told :])
        self.told = len(progress.losses)
        return new


@contextmanager
def _beating(job: Job, store: Store, worker: Worker) -> Iterator[None]:
    """Signs of life from a thread, however long a step or the evaluation takes."""
    over = threading.Event()

    def heartbeat() -> None:
        while not over.wait(BEAT_EVERY):
            with suppress(StoreError):
                store.heartbeat(job, worker)

    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _set_damaged_aside(store: Store, job: Job) -> str:
    """A sentence when the job's checkpoint was there but could not be read; it is then out of the way."""
    path = store.checkpoint_of(job)
    if not path.exists():
        return ""
    try:
        checkpoint.load(path)
    except UserError:
        aside = path.replace(path.with_name(path.name + ".bad"))
        return f"the checkpoint of {job.recipe.title} was damaged and is kept as {aside}; that run starts anew"
    return ""


def _release(job: Job, store: Store, worker: Worker) -> None:
    with suppress(StoreError):
        store.release(job, worker)


def _reported(error: Exception, job: Job, store: Store) -> str:
    """One line of an error that is nobody's mistake, with the file where all of it is."""
    import traceback

    said: Any = str(error).strip().splitlines() or [""]
    path = store.folder / "failed" / f"{job.id}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
        return f"{type(error).__name__}: {said[0]} (all of it is in {path})"
    except OSError:
        return f"{type(error).__name__}: {said[0]}"
