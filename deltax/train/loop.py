"""The training loop. Everything that varies from paper to paper is a slot of the recipe; this file is what does not."""

import math
import time
import warnings
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
from deltax.parts.training.objectives import counted, mixing
from deltax.parts.training.run import Loop, Run
from deltax.parts.training.steps import moving, one_step
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
    """A finished run. `evaluation` is None when it diverged, at the step `progress` stopped at.

    `pieces` is the sentence of `in_pieces`.
    """

    model: nn.Module
    progress: Progress
    evaluation: Evaluation | None
    pieces: str = ""

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

    A loss or gradient that is not finite ends the run as diverged. Where a batch is cut into pieces and the recipe is
    not the same on pieces, that is a warning, and in the outcome. Raises UserError for a recipe that cannot be built.
    """
    machine = machine or Machine.here(precision=job.dtype)
    torch.set_num_threads(machine.threads)
    run, task, loop = kernels.fastest(job.recipe, machine.device)(), task_of(job.recipe), loop_of(job.recipe)
    mesh.check(loop.batch, loop.accumulate)
    pieces = in_pieces(job.recipe, loop)
    if pieces and mesh.rank() == 0:
        warnings.warn(pieces, stacklevel=3)
    fresh = build(run, task, job.seed, job.recipe.title)
    model, engine = mesh.place(fresh, machine.device, compiled=machine.compiled)
    if weights is not None:
        checkpoint.load_model(model, weights)
    with making(job.recipe.title, run.optimizer, "optimizer"):
        optimizer = run.optimizer(model)
    mesh.sorted_groups(optimizer)
    gradients = Gradients(job, machine, run, model, engine, optimizer)
    progress = Progress()
    if save_to and mesh.of_first(save_to.exists()):
        tensors, facts = checkpoint.load(save_to)
        checkpoint.restore(model, optimizer, tensors)
        progress = Progress(**facts)
    started, saving = time.monotonic() - progress.seconds, Saving(save_every)

    while progress.step < job.steps:
        loss, finite = gradients.of_step(progress.step)
        progress.losses.append((progress.step, loss))
        if not finite:
            return Outcome(model, progress, None, pieces)
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
        if save_to and saving.due():
            checkpoint.save(save_to, checkpoint.flatten(model, optimizer), vars(progress))
            saving = Saving(save_every)
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # what it trains at is not what it would have used
    model.eval()
    with machine.autocast():
        evaluation = mesh.beside(model, engine, lambda reader: task.evaluate(reader, run.objective))
    mesh.reshard(engine)
    return Outcome(model, progress, evaluation if math.isfinite(evaluation.score) else None, pieces)


class Gradients:
    """The gradients of each step of a job, by the schedule's rate, ready for its optimizer to step."""

    def __init__(
        self,
        job: Job,
        machine: Machine,
        run: Run,
        model: nn.Module,
        engine: nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        self.job, self.machine, self.run, self.model, self.engine = job, machine, run, model, engine
        self.optimizer, self.lrs = optimizer, [group["lr"] for group in optimizer.param_groups]
        self.task, self.loop = task_of(job.recipe), loop_of(job.recipe)
        self.reduce, self.moved = mesh.reducer(model, self.loop.max_grad_norm), moving(model)

    def of_step(self, step: int) -> tuple[float, bool]:
        """The loss of the step's batch, and whether it and the gradients are finite."""
        job, loop = self.job, self.loop
        factor = job.lr_scale * self.run.schedule((step + 0.5) / job.steps)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        reseed(stream("step", job.seed, step))
        draw = lambda reader: self.run.batches(reader, self.task, step, size=loop.batch, seed=job.seed)
        with one_step(
            self.moved, mesh.gathered
        ):  # begins while FSDP2 holds shards only: what moves them moves them all
            batch, seed = mesh.beside(self.model, self.engine, draw), stream("pieces", job.seed, step)
            part = accumulate(self.engine, self.run, batch, loop.accumulate, self.machine, seed=seed)
            loss, norm = self.reduce(part)
        return loss, math.isfinite(loss) and bool(norm.isfinite())


def in_pieces(recipe: Part, loop: Loop) -> str:
    """How training in pieces differs from training on whole batches; empty where it does not, or nothing is cut."""
    count = mesh.microbatches(loop.accumulate) * mesh.layout().shares
    reasons = "; ".join(mixing(recipe)) if count > 1 else ""
    return f"the {count} pieces of a batch of {loop.batch} are not the whole batch: {reasons}" if reasons else ""


def build(run: Run, task: Any, seed: int, title: str = "the recipe") -> nn.Module:
    """A fresh model in training mode, as its constructors make it from the seed's named streams.

    Every engine's model is built here. Layers that take their sizes from their first input are given a batch. Raises
    UserError when the parts do not fit together, and for a next-token model that reads its targets.
    """

    def make() -> nn.Module:
        model = run.build(task.task_spec)
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
    values = [f"{name}={value!r}" for name, value in part.kwargs if not inside(value)]
    return f"{part.target.__name__}({', '.join([*values, *['...'] * (len(values) < len(part.kwargs))])})"


def accumulate(
    engine: nn.Module, run: Run, batch: Any, pieces: int, machine: Machine, *, seed: int | None = None
) -> Tensor:
    """Backward over this process's share of the batch, piece by piece; its part of the mean loss over the batch.

    Each example counts the same, or each token where the objective is a mean over tokens, whatever the pieces. With a
    seed each piece but the first of all draws from a stream of its own, so that n processes draw what one process does
    that accumulates n pieces. Along a pipeline the last stage has the loss, the others zero.
    """
    count, total = mesh.microbatches(pieces) * mesh.layout().shares, torch.zeros(())
    every = batch.pieces(count)
    sizes = [counted(run.objective, piece) for piece in every] if len(every) > 1 else [1]
    # The mean over processes follows, so this process's part counts as many times as there are shares.
    counts = [size * mesh.layout().shares / sum(sizes) for size in sizes]
    ours = list(zip(mesh.shard(range(len(every))), mesh.shard(every), mesh.shard(counts), strict=True))
    if isinstance(engine, Pipeline):
        _draw_for(seed, mesh.shard_index())
        with machine.autocast():
            return engine.backward(run.objective, [piece.to(machine.device) for _, piece, _ in ours])
    for at, piece, counts_for in ours:
        _draw_for(seed, at)
        with machine.autocast():
            loss = mesh.ask(engine, run.objective, piece.to(machine.device)).mean() * counts_for
        loss.backward()
        total += loss.detach().cpu().float()
    return total


def _draw_for(seed: int | None, piece: int) -> None:
    if piece and seed is not None:
        reseed(stream("piece", seed, piece))


class Saving:
    """When to save next: some seconds from now, by the first process's clock, as clocks differ.

    Asking it costs all processes a message, so each answer is after how many steps to ask again: those of half of the
    time that is left.
    """

    def __init__(self, seconds: float):
        self.seconds, self.began, self.taken, self.ask_at = seconds, time.monotonic(), 0, 1

    def due(self) -> bool:
        """Called after each step, on all processes."""
        self.taken += 1
        if self.taken < self.ask_at:
            return False
        passed = time.monotonic() - self.began
        left = (self.seconds - passed) / passed * self.taken if passed else 1
        wait = 0 if passed > self.seconds else max(1, int(left / 2)) if mesh.size() > 1 else 1
        wait = int(mesh.of_first(wait))
        self.ask_at = self.taken + wait
        return not wait
