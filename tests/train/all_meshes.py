"""Every recipe that trains, on dp=2 and fsdp=2, against one process: `python tests/train/all_meshes.py [RECIPE ...]`.

One process that accumulates two pieces draws what two processes draw, so also recipes with dropout, views or noise lose
alike. Prints a line for each recipe that does not, and ends with 1 where there is one.
"""

import os
import subprocess
import sys
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from zlib import crc32

import torch

from deltax import Part, UserError, catalog, recipe
from deltax.train.job import Job
from deltax.train.launch import launch
from deltax.train.loop import Progress, train
from deltax.train.mesh import Mesh

STEPS = 3
SMALL = ("task.context=16", "task.held_out=16")
OFTEN = ("optimizer.workers=2", "optimizer.every=1", "optimizer.stages=2")  # so that few steps show what they do


@cache
def trained() -> tuple[str, ...]:
    """Every recipe of the catalogue, and every delta that trains on the recipe that it is shown on."""
    known = catalog.papers()
    found = []
    for record in known.values():
        if record.kind == "recipe":
            found.append(record.key)
        elif record.kind == "delta" and record.trains:
            whole = catalog.shown_on(record, known)
            last = whole.rpartition("+")[2]
            found.append(whole if record.key in known[last].imports else f"{whole}+{record.key}")
    return tuple(dict.fromkeys(found))


def sample(expressions: tuple[str, ...], count: int) -> tuple[str, ...]:
    """So many of them, others at each commit; all where the environment has DELTAX_ALL_RECIPES."""
    if os.environ.get("DELTAX_ALL_RECIPES"):
        return expressions
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout
    return tuple(sorted(expressions, key=lambda each: crc32(f"{commit}{each}".encode()))[:count])


def job(expression: str, *settings: str, steps: int = STEPS, rate: float = 0.7) -> Job:
    """A few steps on few examples. The schedule's factor is another at each."""
    batch = 32 if "grpo" in expression else 4  # each piece holds whole groups of answers
    words = dict(recipe(expression).walk())
    fitting = [each for each in SMALL + OFTEN if each.partition("=")[0] in words]
    return Job(recipe(expression, [f"loop.batch={batch}", *fitting, *settings]), steps=steps, rate=rate)


class Done(Exception):
    """All steps are taken: nothing is evaluated."""


Losses = dict[str, list[float] | str]


def losses(jobs: dict[str, Job]) -> Losses:
    """Each job's loss at every step, or why there is none."""
    found: Losses = {}
    for name, each in jobs.items():
        try:
            train(each, on_step=lambda progress, name=name, each=each: _keep(progress, name, each, found))
        except Done:
            pass
        except UserError as error:
            found[name] = f"refused: {error}"
        except Exception:
            found[name] = f"broke: {traceback.format_exc(limit=-2)}"
    return found


def _keep(progress: Progress, name: str, job: Job, found: Losses) -> None:
    found[name] = [loss for _, loss in progress.losses]
    if progress.step == job.steps:
        raise Done


def compared(jobs: dict[str, Job], axes: str) -> dict[str, str]:
    """The jobs whose losses on this mesh are not those of one process, each with what was found instead."""
    cut = {name: replace(each, recipe=_twice_cut(each.recipe)) for name, each in jobs.items()}
    alone = losses(cut)
    on_mesh = launch(2, losses, jobs, layout=Mesh.parse(axes), patience=60)[0]
    faults = {}
    for name, found in on_mesh.items():
        if isinstance(found, str) or isinstance(alone[name], str) or not _close(found, alone[name]):
            faults[name] = f"{found}, one process: {alone[name]}"
    return faults


def _twice_cut(made: Part) -> Part:
    return made.put("loop.accumulate", 2 * made["loop.accumulate"])


def _close(found: list[float], alone: list[float]) -> bool:
    return torch.allclose(torch.tensor(found), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def main(expressions: tuple[str, ...]) -> int:
    count = 0
    for axes in ("dp=2", "fsdp=2"):
        for expression, fault in compared({e: job(e) for e in expressions or trained()}, axes).items():
            print(f"{axes} {expression}: {fault}", flush=True)
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
