"""What a recipe costs: parameters, FLOPs, memory, state and speed. Everything but speed is counted, not timed."""

import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deltax import kernels
from deltax.errors import UserError
from deltax.lab.numerals import millions
from deltax.parts.attention.context import Context, DecodingState, takes_context
from deltax.parts.attention.scratch import scratch
from deltax.recipe import Part
from deltax.train.job import loop_of, task_of
from deltax.train.loop import build, making
from deltax.train.machine import Machine


@dataclass(frozen=True)
class Cost:
    """What one training step of a recipe takes, and what it holds.

    parameters             trained numbers, each shared one once
    flops_per_step         of matrix products: data, forward, backward and optimizer, on the reference kernels
    tokens_per_step        as the task counts them
    peak_bytes             most held in tensors at once over two steps from a bare start: weights, gradients, optimizer
                           state, activations, on the kernels that this machine trains with
    state_bytes_per_token  growth of the decoding state of one sequence with its length; None where nothing is kept
    """

    parameters: int
    flops_per_step: int
    tokens_per_step: int
    peak_bytes: int
    state_bytes_per_token: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """Seconds per training step of k recipes over n interleaved blocks, (k, n), on one machine."""

    seconds: np.ndarray
    tokens_per_step: tuple[int, ...]

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each recipe, at its median block."""
        return [tokens / float(np.median(s)) for tokens, s in zip(self.tokens_per_step, self.seconds, strict=True)]


class Stepper:
    """A fresh model under training, one optimizer step a call: what is timed, counted and weighed here.

    `reference` keeps the kernels that the recipe names; otherwise they are the machine's fastest, as in training.
    """

    def __init__(self, recipe: Part, machine: Machine, *, kernel: str = "fastest", size: int | None = None):
        named = recipe if kernel == "reference" else kernels.fastest(recipe, machine.device)
        self.machine, self.run, self.task, self.loop = machine, named(), task_of(recipe), loop_of(recipe)
        self.size = size or self.loop.batch
        self.model = build(self.run, self.task, 0, recipe.title).to(machine.device)
        with making(recipe.title, self.run.optimizer, "optimizer"):
            self.optimizer = self.run.optimizer(self.model)
        self.step = 0

    def __call__(self) -> None:
        torch.manual_seed(self.step)
        batch = self.run.batches(self.model, self.task, self.step, size=self.size, seed=0)
        for piece in batch.pieces(min(self.loop.accumulate, self.size)):
            with self.machine.autocast():
                loss = self.run.objective(self.model, piece.to(self.machine.device)).mean()
            (loss / self.loop.accumulate).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.loop.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def timed(self, steps: int) -> float:
        """Seconds a step, over `steps` of them."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self()
        self._wait()
        return (time.perf_counter() - start) / steps

    def _wait(self) -> None:
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()


def cost(recipe: Part, machine: Machine | None = None) -> Cost:
    """What a recipe costs. Raises UserError for one that cannot be built."""
    machine = machine or Machine.here()
    model = build(recipe(), task_of(recipe), 0, recipe.title)
    return Cost(
        parameters=parameters(model),
        flops_per_step=flops_per_step(recipe),
        tokens_per_step=tokens_per_step(recipe),
        peak_bytes=peak_bytes(recipe, machine),
        state_bytes_per_token=state_bytes_per_token(model, task_of(recipe)),
    )


def parameters(model: nn.Module) -> int:
    """Trained numbers, each shared one once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tokens_per_step(recipe: Part) -> int:
    return task_of(recipe).tokens(loop_of(recipe).batch)


@lru_cache(maxsize=256)
def flops_per_step(recipe: Part) -> int:
    """FLOPs of the matrix products of one training step, a product of (m, k) and (k, n) counting 2 m k n.

    Counted by torch on the reference kernels, which are plain products; a part that calls torch's fused attention is
    counted on its MATH backend, as the fused CPU kernel counts nothing. What is affine in the size of the batch for
    1, 2 and 3 examples is counted there and extended, exactly; anything else is counted at full size.
    """
    batch = loop_of(recipe).batch
    if batch > 3:
        one, two, three = (_count(recipe, size) for size in (1, 2, 3))
        if three - two == two - one:
            return one + (batch - 1) * (two - one)
    return _count(recipe, batch)


def peak_bytes(recipe: Part, machine: Machine | None = None) -> int:
    """Most bytes held in tensors at once over two training steps from a bare start, on one device."""
    machine = machine or Machine.here()
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stepper = Stepper(recipe, machine)
        for _ in range(2):
            stepper()
        return torch.cuda.max_memory_allocated() - before
    scratch.clear()  # what larger recipes left is not this one's
    with _Held() as held:
        stepper = Stepper(recipe, machine)
        for _ in range(2):
            stepper()
    return held.peak


@torch.inference_mode()
def state_bytes_per_token(model: nn.Module, task: Any) -> float | None:
    """Growth of the decoding state of one sequence between half of its length and all of it, bytes a token.

    None where a model reads no tokens, cannot decode from a state, or keeps nothing while it decodes.
    """
    tokens = getattr(next(iter(task.held_out_batches(1))), "inputs", None)
    if not (
        takes_context(model) and isinstance(tokens, Tensor) and tokens.ndim == 2 and not tokens.is_floating_point()
    ):
        return None
    model.eval()
    long, short = tokens.shape[1], tokens.shape[1] // 2
    held = []
    for length in (short, long):
        state = DecodingState()
        try:
            model(tokens[:1, :length], Context(state=state))
        except UserError:  # a part that looks at the whole sequence refuses a state
            return None
        held.append(state.bytes())
    return (held[1] - held[0]) / (long - short) if any(held) else None


def speed(recipes: Sequence[Part], *, blocks: int = 7, steps: int = 2, machine: Machine | None = None) -> Speed:
    """Time training steps in blocks X, Y, ..., X, Y, ... so that what slows the machine slows all alike.

    The first block of each is warm-up and not kept. Meaningful on an otherwise idle machine only. Pairs of rows are for
    `deltax.lab.gain.speed_ratio`, whose interval needs 6 blocks for 95 %.
    """
    if blocks < 2:
        raise UserError(f"a speed needs at least 2 blocks, not {blocks}")
    machine = machine or Machine.here()
    torch.set_num_threads(machine.threads)
    steppers = {recipe: Stepper(recipe, machine) for recipe in recipes}
    rounds = [{recipe: stepper.timed(steps) for recipe, stepper in steppers.items()} for _ in range(blocks + 1)][1:]
    seconds = np.array([[each[recipe] for each in rounds] for recipe in recipes])
    return Speed(seconds, tuple(tokens_per_step(recipe) for recipe in recipes))


def scale(recipe: Part, steps: int) -> str:
    """What a verdict is about: "0.37M parameters, 0.8M tokens, library of Python 3.11"."""
    task = task_of(recipe)
    data = getattr(getattr(task, "corpus", None), "name", None) or recipe["task"].target.__name__.lower()
    size = parameters(build(recipe(), task, 0))
    return f"{millions(size)} parameters, {millions(steps * tokens_per_step(recipe))} tokens, {data}"


def _count(recipe: Part, size: int) -> int:
    stepper = Stepper(kernels.reference(recipe), Machine(), kernel="reference", size=size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stepper()
    return counter.get_total_flops()


class _Held(TorchDispatchMode):
    """Bytes of all CPU storages that operations make while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
