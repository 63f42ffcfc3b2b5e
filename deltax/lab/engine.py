"""Run what the store lacks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from deltax.lab.store import Result, Store
from deltax.train.job import Job


@dataclass(frozen=True)
class Event:
    """What happened to a run.

    kind    "reused", "waiting" (another process trains it), "started", "step", "restarted" (its checkpoint was
            damaged), "finished" or "failed"
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


def execute(
    jobs: Iterable[Job],
    *,
    store: Store,
    engine: str = "local",
    workers: int = 2,
    on_event: Callable[[Event], Any] = lambda event: None,
    keep_weights: bool = False,
) -> dict[str, Result]:
    """Every job's result by `Job.id`, training only what the store lacks."""
    from deltax.lab.engine_inline import run

    return run(jobs, store, on_event, keep_weights)
