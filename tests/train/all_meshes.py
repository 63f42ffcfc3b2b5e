"""Every recipe that trains, on dp=2 and fsdp=2, against one process: `python tests/train/all_meshes.py [RECIPE ...]`.

One process that accumulates two pieces draws what two processes draw, so also recipes with dropout, views or noise lose
alike. Prints a line for each recipe that does not, and ends with 1 where there is one.
"""

import sys
import traceback
from functools import cache

import torch

from deltax import UserError, catalog, recipe
from deltax.train.job import Job
from deltax.train.launch import launch
from deltax.train.loop import Progress, train
from deltax.train.mesh import Mesh

STEPS = 3


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
            found.append(whole if record.key in known[last].parents else f"{whole}+{record.key}")
    return tuple(dict.fromkeys(found))


def job(expression: str, *settings: str) -> Job:
    """A few steps on few examples. The schedule's factor is another at each."""
    batch = 32 if "grpo" in expression else 4  # each piece holds whole groups of answers
    made = recipe(expression, [f"loop.batch={batch}", *settings])
    small = [word for word in ("task.context=16", "task.held_out=16") if word.partition("=")[0] in dict(made.walk())]
    return Job(recipe(expression, [f"loop.batch={batch}", *small, *settings]), steps=STEPS, rate=0.7)


class Done(Exception):
    """All steps are taken: nothing is evaluated."""


def losses(jobs: dict[str, Job]) -> dict[str, list[float] | str]:
    """Each job's loss at every step, or why there is none."""
    found: dict[str, list[float] | str] = {}
    for name, each in jobs.items():
        try:
            train(each, on_step=lambda progress, name=name: _keep(progress, name, found))
        except Done:
            pass
        except UserError as error:
            found[name] = f"refused: {error}"
        except Exception:
            found[name] = f"broke: {traceback.format_exc()}"
    return found


def _keep(progress: Progress, name: str, found: dict[str, list[float] | str]) -> None:
    found[name] = [loss for _, loss in progress.losses]
    if progress.step == STEPS:
        raise Done


def compared(expressions: tuple[str, ...], axes: str) -> dict[str, str]:
    """The recipes whose losses on this mesh are not those of one process, each with what was found instead."""
    alone = losses({e: job(e, "loop.accumulate=2") for e in expressions})
    jobs = {e: job(e) for e, found in alone.items() if not isinstance(found, str)}
    on_mesh = launch(2, losses, jobs, layout=Mesh.parse(axes), patience=60)[0]
    faults = {e: f"alone: {found}" for e, found in alone.items() if isinstance(found, str)}
    for expression, found in on_mesh.items():
        if isinstance(found, str):
            faults[expression] = found
        elif not torch.allclose(torch.tensor(found), torch.tensor(alone[expression]), rtol=1e-4, atol=1e-5):
            faults[expression] = f"{found}, one process {alone[expression]}"
    return faults


def main(expressions: tuple[str, ...]) -> int:
    count = 0
    for axes in ("dp=2", "fsdp=2"):
        for expression, fault in compared(expressions or trained(), axes).items():
            print(f"{axes} {expression}: {fault}", flush=True)
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
