"""Run what the store lacks: here, in processes of this machine, or over a Ray cluster."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from deltax.errors import StoreError, UserError, nearest
from deltax.lab.lease import Worker
from deltax.lab.store import Result, Store
from deltax.lab.worker import UNDER_WAY, Message, Tell
from deltax.train.job import Job, loop_of, task_of

ENGINES = ("local", "inline", "ray")
POLL = 0.25


@dataclass(frozen=True)
class Event:
    """What happened to a run.

    kind    "reused", "waiting" (another process trains it), "started", "step", "restarted" (its checkpoint was
            damaged, or its worker died), "finished" or "failed"
    done    how many of the `of` runs asked for are in the store now
    losses  (step, nats) since the run's last event
    text    a sentence, with "restarted" and "failed"
    """

    kind: str
    job: Job
    done: int
    of: int
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    result: Result | None = None
    text: str = ""


class Pool(Protocol):
    """Workers that an engine has. What they say goes to the `tell` they were made with, during `poll`."""

    def __enter__(self) -> "Pool": ...

    def __exit__(self, *error: Any) -> None:
        """Let the workers go; those at work save their runs first."""

    def idle(self) -> Worker | None:
        """A worker with nothing to do, who can claim a run."""

    def start(self, worker: Worker, job: Job) -> None:
        """Hand a claimed run to that worker."""

    def poll(self, seconds: float) -> None:
        """Wait until a worker says something, at most so long."""


def execute(
    jobs: Iterable[Job],
    *,
    store: Store,
    engine: str = "local",
    workers: int = 2,
    threads: int = 1,
    on_event: Callable[[Event], Any] = lambda event: None,
    keep_weights: bool = False,
) -> dict[str, Result]:
    """Every job's result by `Job.id`, training only what the store lacks, the longest first.

    engine  "local": processes of this machine, one thread each; "inline": this process, one run after the other;
            "ray": the Ray cluster that RAY_ADDRESS names, or one started here
    threads  that "inline" computes with
    A run that another process trains is waited for. A run that diverges is a result. One that fails is reported when
    the others are done, as a UserError with its recipe's title. Interrupted, the runs under way are saved first.
    """
    wanted = {job.id: job for job in jobs}
    running = _Execution(wanted, store, on_event, keep_weights)
    running.reuse()
    if running.queue:
        store.check_writable()
        with _pool(engine, store, min(workers, len(running.queue)), threads, running.hear, keep_weights) as pool:
            running.go(pool)
    if running.failures:
        title, text = running.failures[0]
        more = len(running.failures) - 1
        named = text if text.startswith(title) else f"{title}: {text}"
        raise UserError(named + (f"; and {more} more runs failed" if more else ""))
    return {id: running.results[id] for id in wanted}


class _Execution:
    def __init__(self, wanted: dict[str, Job], store: Store, on_event: Callable[[Event], Any], keep_weights: bool):
        self.wanted, self.store, self.on_event, self.keep_weights = wanted, store, on_event, keep_weights
        self.results: dict[str, Result] = {}
        self.failures: list[tuple[str, str]] = []
        self.queue: list[Job] = []
        self.away: set[str] = set()  # with workers of ours
        self.waited: set[str] = set()  # with another process
        self.died: set[str] = set()

    def reuse(self) -> None:
        for job in self.wanted.values():
            if not self._arrived(job, "reused"):
                self.queue.append(job)
        self.queue.sort(key=_length, reverse=True)

    def go(self, pool: Pool) -> None:
        while self.queue or self.away:
            for job in list(self.queue):
                worker = pool.idle()
                if worker and self.store.claim(job, worker):
                    if self._arrived(job, "finished"):  # by another process, just before
                        self.store.release(job, worker)
                    else:
                        self.away.add(job.id)
                        pool.start(worker, job)
                    self.queue.remove(job)
                elif worker and job.id not in self.waited:
                    self.waited.add(job.id)
                    self._tell("waiting", job)
            pool.poll(POLL)
            for job in [job for job in self.queue if job.id in self.waited]:
                if self._arrived(job, "finished"):
                    self.queue.remove(job)

    def hear(self, message: Message) -> None:
        job = self.wanted[message.id]
        if message.kind in UNDER_WAY:
            said = (message.step, message.loss, message.tokens_per_second, message.losses)
            self._tell(message.kind, job, *said, text=message.text)
            return
        self.away.discard(job.id)
        if message.disk:
            raise StoreError(message.text)
        if message.kind == "finished":
            self._arrived(job, "finished", message.losses)
        elif message.kind == "stopped":
            self.queue.append(job)
        elif message.kind == "died" and job.id not in self.died:
            self.died.add(job.id)
            self.queue.append(job)
            self._tell("restarted", job, text=f"{message.text}; {job.recipe.title} goes on from its checkpoint")
        else:
            self.failures.append((job.recipe.title, message.text))
            self._tell("failed", job, text=message.text)

    def _arrived(self, job: Job, kind: str, losses: tuple[tuple[int, float], ...] | None = None) -> bool:
        found = self.store.get(job)
        if found is None or (self.keep_weights and not found.weights_file and not found.diverged):
            return False
        self.results[job.id] = found
        told = tuple(found.losses) if losses is None else losses
        self._tell(kind, job, len(found.losses), losses=told, result=found)
        return True

    def _tell(self, kind: str, job: Job, *values: Any, **named: Any) -> None:
        self.on_event(Event(kind, job, len(self.results), len(self.wanted), *values, **named))


def _pool(engine: str, store: Store, workers: int, threads: int, tell: Tell, keep_weights: bool) -> Pool:
    if engine == "local":
        from deltax.lab.processes import Processes

        return Processes(store, workers, tell, keep_weights)
    if engine == "inline":
        from deltax.lab.processes import Inline

        return Inline(store, threads, tell, keep_weights)
    if engine == "ray":
        from deltax.lab.ray_engine import Cluster

        return Cluster(store, tell, keep_weights)
    raise UserError(f"there is no engine {engine!r}{nearest(engine, ENGINES) or ': local, inline or ray'}")


def _length(job: Job) -> int:
    """Training tokens."""
    return job.steps * task_of(job.recipe).tokens(loop_of(job.recipe).batch)
