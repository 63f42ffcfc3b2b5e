"""Named streams of random numbers, so that two recipes share the start of every tensor they share.

The start of a model is what its constructor makes: nothing is drawn anew afterwards. Each number that a constructor
draws comes from a stream named by the tensor of the model that it fills.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltax.errors import UserError

_PASSES = 4  # a constructor whose draws depend on earlier draws takes more than two
_TORCH = os.path.dirname(torch.__file__) + os.sep
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_SOME_NAN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def stream(*words: object) -> int:
    """A seed that depends on all the words, and differs wherever one differs."""
    text = "\0".join(str(word) for word in words)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1


def reseed(seed: int) -> None:
    """`torch.manual_seed`, but not for a GPU that nothing has used: for that it keeps a stack trace, 0.2 ms a call."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def construct(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model that `make` constructs, each random number drawn from a stream named by the tensor that it fills.

    A tensor's start depends on the seed, on its name and on what the constructor does to it; on no other tensor. So
    two models share the start of every tensor that both construct alike, and every process constructs the same.

        names = {}                                  # of the draws, in order
        repeat:
            model = make(), draw i seeded by (seed, names[i])
            names'[i] = the tensor that draw i went into, and how many later draws went there too
        until names' = names

    The first pass finds the names, as a module does not know its own while it is constructed. What a wrap holds as its
    `inner` has the name of the wrap, so that it starts as it would without. The global generators of numpy and of
    `random` are seeded once. What a constructor draws from a `torch.Generator`, or after `torch.manual_seed`, it keeps.

    Raises UserError for a parameter without a start: left as `torch.empty`, or on the meta device.
    """
    names: list[tuple] = []
    for _ in range(_PASSES):
        model = None  # the pass before is freed before this one takes memory
        draws = _Draws(seed, names)
        with _generators(stream("start", seed)), draws:
            model = make()
        _check(model)
        found = draws.names_of(model)
        if found == names:
            break
        names = found
    return model


class _Draws(TorchDispatchMode):
    """Seeds each random operation by its name, and follows where the numbers that it draws go."""

    def __init__(self, seed: int, names: list[tuple]):
        super().__init__()
        self.seed, self.names = seed, names
        self.count = 0
        self.ours: set[int] = {stream("start", seed)}  # all seeds set here; any other is a constructor's
        self.theirs: FrameType | None = None  # the code that set it
        self.left = torch.empty(0)  # how that code's last draw left the generator
        self.filled: dict[StorageWeakRef, list[int]] = {}  # the draws into a memory
        self.reached: dict[StorageWeakRef, set[int]] = {}  # those, and the draws that its values were computed from

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        if draws:
            at = self.count
            self.count += 1
            if not self._seeded_by_the_constructor():
                named = stream("start", self.seed, *(self.names[at] if at < len(self.names) else ("", at)))
                self.ours.add(named)
                reseed(named)
        out = func(*args, **kwargs)
        if draws and self.theirs:
            self.left = torch.get_rng_state()
        if func.overloadpacket.__name__ in _EMPTY and out.dtype in _SOME_NAN:
            out.fill_(torch.nan)  # so that a start left to chance is seen
        given, made = _memories((args, kwargs)), _memories((out, _written(func, args)))
        after = set().union(*(self.reached.get(memory, ()) for memory in given), {at} if draws else ())
        if after:
            for memory in made:
                self.reached.setdefault(memory, set()).update(after)
                if draws:
                    self.filled.setdefault(memory, []).append(at)
        return out

    def _seeded_by_the_constructor(self) -> bool:
        """Whether code that is still running has called `torch.manual_seed`; its draws are its own."""
        if torch.initial_seed() in self.ours:
            self.theirs = None
            return False
        running = list(_frames())
        if not torch.equal(torch.get_rng_state(), self.left):  # seeded since the last draw
            self.theirs = next(frame for frame in running if not frame.f_code.co_filename.startswith(_TORCH))
        return self.theirs in running

    def names_of(self, model: nn.Module) -> list[tuple]:
        """For each draw the tensor that it filled, else the first that was computed from it, and its number there.

        Draws into one tensor are counted from the last, which stays: those that it overwrites name no other.
        """
        tensors = list(_tensors(model))
        owner: dict[int, tuple] = {}
        for reached in (self.filled, self.reached):
            for name, memory in tensors:
                for draw in reached.get(memory, ()):
                    owner.setdefault(draw, name)
        into: dict[tuple, list[int]] = {}
        for draw in range(self.count):
            into.setdefault(owner.get(draw, ("",)), []).append(draw)
        found: list[tuple] = [()] * self.count
        for name, draws in into.items():
            for later, draw in enumerate(reversed(draws)):
                found[draw] = (*name, later)
        return found


def _frames() -> Iterator[FrameType]:
    """The calls that led here from a constructor, innermost first."""
    frame = sys._getframe(1)
    while frame := frame.f_back:
        if frame.f_code.co_filename != __file__:
            yield frame


def _tensors(model: nn.Module) -> Iterator[tuple[tuple, StorageWeakRef]]:
    """Every tensor of the model, named without the steps `inner`; of those that share a name so the innermost is 0."""
    held: dict[str, list[tuple[int, Tensor]]] = {}
    for path, module in model.named_modules():
        steps = path.split(".") if path else []
        bare = [step for step in steps if step != "inner"]
        own = {**vars(module)["_parameters"], **vars(module)["_buffers"], **vars(module)}
        for name, tensor in own.items():
            if isinstance(tensor, Tensor):
                held.setdefault(".".join([*bare, name]), []).append((len(steps), tensor))
    for name, tensors in held.items():
        innermost_first = sorted(tensors, key=lambda pair: -pair[0])
        for rank, (_, tensor) in enumerate(innermost_first):
            yield from (((name, rank), memory) for memory in _memories(tensor))


def _memories(values: Any) -> list[StorageWeakRef]:
    """The memory of each tensor among the values; a weak reference keeps its address from being given away again."""
    found = []
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            try:
                found.append(StorageWeakRef(tensor.untyped_storage()))
            except (NotImplementedError, RuntimeError):  # sparse, or a wrapper around other tensors
                continue
    return found


def _written(func: Any, args: tuple) -> list[Any]:
    """The arguments that an operation writes to and need not return, as `torch._foreach_mul_`."""
    return [a for spec, a in zip(func._schema.arguments, args) if spec.alias_info and spec.alias_info.is_write]


@contextmanager
def _generators(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and `random` seeded, and afterwards as they were."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng():
            reseed(seed)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{name} is on the meta device, where a tensor has no values: construct it on the CPU")
        if parameter.dtype in _SOME_NAN and parameter.isnan().any():
            raise UserError(f"{name} starts with NaN: its constructor must initialise what torch.empty makes")
