"""A process for each worker of a recipe whose optimizer is `LocalSteps`, as far apart as you like.

    python -m deltax.train.islands register 29400
    python -m deltax.train.islands work job.json --worker 0 --at host:29400 --into weights.safetensors

gives, up to rounding, the weights that `deltax.train.loop.train` gives in one process, which plays the workers in turn.
A worker may die and come back under its number: the others go on without it after `patience` seconds at most, and it
goes on from what they share.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltax import kernels
from deltax.errors import UserError
from deltax.papers.optimization.local_sgd import LocalSteps
from deltax.parts.replicas import assign, flat
from deltax.train import checkpoint
from deltax.train.job import Job, loop_of, task_of
from deltax.train.loop import Gradients, Outcome, Progress, build, in_pieces
from deltax.train.machine import Machine, settle
from deltax.train.meeting import Meeting, numbers, register


@dataclass(frozen=True)
class Round:
    """What a worker tells after each round: its number, who found the mean, and the bytes it has sent so far itself."""

    round: int
    members: tuple[int, ...]
    sent: int


def train(
    job: Job,
    meeting: Meeting,
    machine: Machine | None = None,
    *,
    on_round: Callable[[Round], None] = lambda round: None,
    within: float = 600.0,
) -> Outcome:
    """This worker's part of a run, to its end; the outcome has what all share. It joins where the run has begun.

    within  seconds to wait to be let in

    Raises UserError for a recipe without `LocalSteps`, another number of workers or another job than the others', and
    when the register is gone.
    """
    machine = machine or Machine.here(precision=job.dtype)
    torch.set_num_threads(machine.threads)
    run, task, loop = kernels.fastest(job.recipe, machine.device)(), task_of(job.recipe), loop_of(job.recipe)
    model = build(run, task, job.seed).to(machine.device)
    workers = run.optimizer(model)
    if not isinstance(workers, LocalSteps):
        raise UserError(f"{job.recipe.title} has one worker: add local-sgd or diloco to train it on islands")
    if len(workers.taken) != meeting.workers:
        raise UserError(f"{job.recipe.title} has {len(workers.taken)} workers, this meeting {meeting.workers}")
    meeting.same(job.id)
    gradients, pieces = Gradients(job, machine, run, model, model, workers), in_pieces(job.recipe, loop)
    progress, started = Progress(), time.monotonic()
    taken = _join(workers, meeting, within) if meeting.begun else 0
    ends = -(-job.steps // meeting.workers)
    while taken < ends:
        turn = taken * meeting.workers + meeting.worker
        if turn < job.steps:
            loss, finite = gradients.of_step(turn)
            progress.losses.append((turn, loss))
            if not finite:
                return Outcome(model, progress, None, pieces)
            workers.inner.step()
            workers.inner.zero_grad(set_to_none=True)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + task.tokens(loop.batch)
        taken += 1
        if taken % workers.every == 0 or taken == ends:
            taken = _meet(workers, meeting, taken, within)
            on_round(Round(-(-taken // workers.every), tuple(meeting.members), workers.exchange.sent))
    meeting.close()
    progress.seconds = time.monotonic() - started
    model.eval()
    with machine.autocast():
        evaluation = task.evaluate(model, run.objective)
    return Outcome(model, progress, evaluation if math.isfinite(evaluation.score) else None, pieces)


@torch.no_grad()
def _meet(workers: LocalSteps, meeting: Meeting, taken: int, within: float) -> int:
    """Hold a round and take the outer step; how many steps have been taken by then."""
    delta = flat(workers.shared).detach() - flat(workers.weights).detach()
    memory = {name: tensor.clone() for name, tensor in workers.exchange.memory().items()}

    def exchange(group: Any) -> Tensor:
        for name, tensor in workers.exchange.memory().items():
            tensor.copy_(memory[name])
        return workers.exchange.over(group, delta)

    mean = meeting.hold(taken, exchange)
    if mean is None:
        return _join(workers, meeting, within)
    workers.descend(workers.outer, mean)
    assign(workers.weights, workers.shared)
    meeting.welcome(lambda: [numbers(taken), *_shared_state(workers)])
    return taken


@torch.no_grad()
def _join(workers: LocalSteps, meeting: Meeting, within: float) -> int:
    """Take over what is shared; how many steps the others have taken."""
    taken = numbers(0)
    workers.descend(workers.outer, torch.zeros_like(flat(workers.shared)))  # makes the outer state, to be filled
    meeting.join([taken, *_shared_state(workers)], within=within)
    assign(workers.weights, workers.shared)
    return int(taken.item())


def _shared_state(workers: LocalSteps) -> list[Tensor]:
    """The weights that are shared, and the outer optimizer's state of them."""
    outer = [workers.outer.state[p] for p in workers.shared]
    moments = [state[word] for state in outer for word in sorted(state) if isinstance(state[word], Tensor)]
    return [p.detach() for p in workers.shared] + moments


def main(argv: list[str] | None = None) -> None:
    """The two commands of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m deltax.train.islands")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("register", help="hold the register of a run").add_argument("port", type=int)
    work = commands.add_parser("work", help="be one worker of a run")
    work.add_argument("job", type=Path, help="a job as JSON")
    work.add_argument("--worker", type=int, required=True)
    work.add_argument("--at", required=True, help="host:port of the register")
    work.add_argument("--into", type=Path, help="where the weights go")
    work.add_argument("--patience", type=float, default=60.0, help="seconds to wait for the others")
    given = parser.parse_args(argv)
    if given.command == "register":
        held = register(given.port)
        print(f"listening at port {held.port}", flush=True)
        while True:
            time.sleep(3600)
    settle()
    job = Job.from_json(json.loads(given.job.read_text()))
    meeting = Meeting(given.at, given.worker, job.recipe["optimizer.workers"], patience=given.patience)
    outcome = train(job, meeting, on_round=lambda round: print(json.dumps(vars(round)), flush=True))
    print(json.dumps({"score": outcome.evaluation and outcome.evaluation.score, "losses": outcome.progress.losses}))
    if given.into:
        checkpoint.save(given.into, outcome.model.state_dict(), {})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"dx: {error}", file=sys.stderr)
        sys.exit(2)
