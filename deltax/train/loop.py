"""The training loop. Everything that varies from paper to paper is a slot of the recipe; this file is what does not."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deltax import kernels
from deltax.errors import UserError
from deltax.parts.training.run import Run
from deltax.recipe import Part
from deltax.tasks.evaluation import Evaluation
from deltax.train import causality, checkpoint, mesh
from deltax.train.initialise import construct, reseed, stream
from deltax.train.job import Job, loop_of, task_of
from deltax.train.machine import Machine
from deltax.train.pipeline import Pipeline


@dataclass
class Progress:
    """Where a run is: optimizer steps done, training tokens read, seconds spent, and its loss so far, (step, nats)."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """A finished run. `evaluation` is None when it diverged, at the step `progress` stopped at."""

    model: nn.Module
    progress: Progress
    evaluation: Evaluation | None

    @property
    def diverged(self) -> bool:
        return self.evaluation is None


class Stop(Exception):
    """Raised by `on_step`: the run is saved and left, to go on from there another time."""


@torch.enable_grad()  # also for a caller who only measures
def train(
    job: Job,
    machine: Machine | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
    save_to: Path | None = None,
    save_every: float = 15.0,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train a job to the end of its budget and evaluate it once, there.

    weights     a state to start from instead of a fresh one
    save_to     a checkpoint file; where it exists the run goes on from it, and ends as if never interrupted
    save_every  seconds between checkpoints
    on_step     told after every step; may raise Stop

    A loss or gradient that is not finite ends the run as diverged. Raises UserError for a recipe that cannot be built.
    """
    machine = machine or Machine.here(precision=job.dtype)
    torch.set_num_threads(machine.threads)
    run, task, loop = kernels.fastest(job.recipe, machine.device)(), task_of(job.recipe), loop_of(job.recipe)
    mesh.check(loop.batch, loop.accumulate)
    model = mesh.place(build(run, task, job.seed, job.recipe.title), machine.device)
    if weights is not None:
        checkpoint.load_model(model, weights)
    with making(job.recipe.title, run.optimizer, "optimizer"):
        optimizer = run.optimizer(model)
    mesh.sorted_groups(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    progress = Progress()
    if save_to and mesh.agreed(save_to.exists()):
        tensors, facts = checkpoint.load(save_to)
        checkpoint.restore(model, optimizer, tensors)
        progress = Progress(**facts)
    engine = mesh.engine(torch.compile(model) if machine.compiled else model, machine.device)
    reduce = mesh.reducer(model, loop.clip)
    saved = started = time.monotonic() - progress.seconds

    while progress.step < job.steps:
        at = run.schedule((progress.step + 0.5) / job.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * job.rate * at
        reseed(stream("step", job.seed, progress.step))
        batch = run.batches(model, task, progress.step, size=loop.batch, seed=job.seed)
        if mesh.ours():
            reseed(stream("share", job.seed, progress.step, mesh.ours()))
        loss, norm = reduce(accumulate(engine, run, batch, loop.accumulate, machine))
        progress.losses.append((progress.step, loss))
        if not (math.isfinite(loss) and norm.isfinite()):
            return Outcome(model, progress, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += task.tokens(loop.batch)
        progress.seconds = time.monotonic() - started
        try:
            on_step(progress)
        except Stop:
            if save_to:
                checkpoint.save(save_to, checkpoint.flatten(model, optimizer), vars(progress))
            raise
        if save_to and mesh.agreed(time.monotonic() - saved > save_every):  # clocks differ
            checkpoint.save(save_to, checkpoint.flatten(model, optimizer), vars(progress))
            saved = time.monotonic()
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # what it trains at is not what it would have used
    model.eval()
    with machine.autocast():
        evaluation = task.evaluate(mesh.reader(model, engine), run.objective)
    return Outcome(model, progress, evaluation if math.isfinite(evaluation.score) else None)


def build(run: Run, task: Any, seed: int, title: str = "the recipe") -> nn.Module:
    """A fresh model in training mode, as its constructors make it from the seed's named streams.

    Every engine's model is built here. Layers that take their sizes from their first input are given a batch. Raises
    UserError when the parts do not fit together, and for a next-token model that reads its targets.
    """

    def make() -> nn.Module:
        model = run.build(task.facts)
        if any(is_lazy(parameter) for parameter in model.parameters()):
            with torch.no_grad():
                batch = run.batches(model.eval(), task, 0, size=run.loop().batch, seed=seed)
                run.objective(model, batch)
        return model

    with making(title, run.model, "model"):
        model = construct(make, seed)
    causality.check(run, task, title)
    return model.train()


@contextmanager
def making(title: str, part: Part, slot: str) -> Iterator[None]:
    """Turn what a constructor raises into a UserError of one sentence: the recipe, the error, the slot and the part."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{title} cannot be built: {said}{_where(error, part, slot)}") from error


def _where(error: BaseException, root: Part, slot: str) -> str:
    """The path of the innermost part that was being made, and the part."""
    frames, made = error.__traceback__, root
    while frames:
        if frames.tb_frame.f_code is Part.__call__.__code__:
            made = frames.tb_frame.f_locals["self"]
        frames = frames.tb_next
    path = next((path for path, value in root.walk() if value is made), "")
    return f" (at {slot}{'.' * bool(path)}{path}: {_brief(made)})"


def _brief(part: Part) -> str:
    """A part with its own values, and dots for the parts in it."""
    inside = lambda value: isinstance(value, Part) or (isinstance(value, tuple) and any(map(inside, value)))
    values = [f"{name}={value!r}" for name, value in part.given if not inside(value)]
    return f"{part.make.__name__}({', '.join([*values, *['...'] * (len(values) < len(part.given))])})"


def accumulate(engine: nn.Module, run: Run, batch: Any, pieces: int, machine: Machine) -> Tensor:
    """Backward over this process's share of the batch, piece by piece; the mean loss over the share.

    Along a pipeline the last stage has it, the others zero.
    """
    shares = mesh.share(batch.pieces(mesh.microbatches(pieces) * mesh.layout().shares))
    shares = [piece.to(machine.device) for piece in shares]
    if isinstance(engine, Pipeline):
        with machine.autocast():
            return engine.backward(run.objective, shares)
    total = torch.zeros(())
    for piece in shares:
        with machine.autocast():
            loss = run.objective(engine, piece).mean() / len(shares)
        loss.backward()
        total += loss.detach().cpu().float()
    return total
