"""Runs of milliseconds, for tests of what surrounds them."""

import sys
from pathlib import Path

from deltax import recipe
from deltax.lab.engine import Event, execute
from deltax.lab.store import Store
from deltax.recipe import Part
from deltax.train.job import Job

TEXT = "".join(f"line {i} of a small text that goes on to {i * i}\n" for i in range(2000))


def source(folder: Path) -> Path:
    path = folder / "small.txt"
    if not path.exists():
        path.write_text(TEXT)
    return path


def tiny(text: Path, expression: str = "gpt", *settings: str) -> Part:
    size = ("model.dim=9", "model.stack.depth=1", "loop.batch=4", "task.context=16", "task.held_out=256")
    return recipe(expression, (*size, f"task.source={text}", *settings))


def jobs(text: Path, count: int, steps: int) -> list[Job]:
    return [Job(tiny(text), seed=seed, steps=steps) for seed in range(count)]


def main(text: str, folder: str, engine: str, count: str, steps: str) -> None:
    """A process of its own that runs some jobs, and prints each event as it comes."""

    def show(event: Event) -> None:
        print(event.kind, event.job.id, event.step, flush=True)

    print("ready", flush=True)
    try:
        execute(jobs(Path(text), int(count), int(steps)), store=Store(folder), engine=engine, on_event=show)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
