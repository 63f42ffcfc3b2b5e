"""Training Deep Nets with Sublinear Memory Cost. Chen, Xu, Zhang, Guestrin, 2016. arXiv:1604.06174

Backpropagation, but only segment boundaries are kept in forward, and activations inside are recomputed in backward.

Of n layers, about sqrt(n) boundaries are kept. When the gradient arrives at a segment, the segment runs forward once
more. Memory grows with the square root of depth, for one more forward pass in all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from deltax import Part, paper
from deltax.errors import UserError
from deltax.parts.attention.context import Context
from deltax.parts.model.stack import straight
from deltax.shapes import Stream


def in_segments(blocks: Iterable[nn.Module], x: Stream, ctx: Context, *, count: int | None = None) -> Stream:
    """Runs all blocks in `count` checkpointed segments, about sqrt(n) by default. (B, T, D) -> (B, T, D)."""
    if ctx.state is not None:
        return straight(blocks, x, ctx)  # decoding has no backward pass
    blocks, beside = list(blocks), tensors(ctx)
    for run in segments(len(blocks), count):
        through = partial(_through, blocks[run], ctx, tuple(beside))
        buffers = [b for block in blocks[run] for b in block.buffers()]
        x = checkpoint(through, x, *beside.values(), buffers=buffers)
    return x


@paper(arxiv="1604.06174", year=2016)
def activation_checkpointing(recipe: Part, *, count: int | None = None) -> Part:
    return recipe.fill("passage", in_segments, count=count)


def checkpoint(function: Callable[..., Any], *args: Tensor, buffers: Iterable[Tensor] = ()) -> Any:
    """function(*args), which saves only `args` for backward and runs `function` again there (section 4).

    `function` returns a tensor or a tuple. Its second run has the random numbers and autocast of the first, and
    `buffers` keep the first run's values. Gradients reach `args`, and in `.grad` the parameters of `function`; any
    other tensor that needs a gradient must be in `args`. Raises UserError under torch.autograd.grad where `function`
    has parameters.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    needed = any(t.requires_grad for t in args)
    leaf = None if needed else torch.empty(0, requires_grad=True)  # so that the output needs a gradient
    return _Checkpoint.apply(function, tuple(buffers), leaf, *args)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], buffers: tuple[Tensor, ...], _: Tensor | None, *args: Tensor
    ) -> Any:
        ctx.function, ctx.buffers = function, buffers
        ctx.surroundings = partial(_as_before, _random_state(args), _autocast(args))
        ctx.save_for_backward(*args)  # the boundary; nothing inside is saved
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        args = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        # batch-norm statistics must not be updated twice
        left = [b.clone() for b in ctx.buffers]
        # the second forward pass, with the first one's random numbers and autocast
        with torch.enable_grad(), ctx.surroundings():
            out = ctx.function(*args)
        # outputs that need no gradient are left out
        pairs = [(o, d) for o, d in zip(_tuple(out), d_out, strict=True) if o.requires_grad]
        if not Variable._execution_engine.is_checkpoint_valid() and _leaves(o for o, _ in pairs) - set(map(id, args)):
            raise UserError("a checkpointed function with parameters gives no torch.autograd.grad: use .backward()")
        torch.autograd.backward(*zip(*pairs, strict=True))
        for buffer, value in zip(ctx.buffers, left, strict=True):
            buffer.data.copy_(value)
        return None, None, None, *(t.grad for t in args)


def segments(count: int, of: int | None = None) -> list[slice]:
    """Slices that cut `count` items into `of` even segments, about sqrt(count) by default (section 4.2).

    Raises UserError for fewer than 1 or more than `count` segments.
    """
    of = round(math.sqrt(count)) if of is None else of
    if count and not 1 <= of <= count:
        raise UserError(f"{of} segments of {count} blocks are impossible: choose 1 to {count} segments")
    # sizes differ by one at most
    ends = [count * i // of for i in range(of + 1)] if count else [0]
    return [slice(a, b) for a, b in pairwise(ends)]


def tensors(ctx: Context) -> dict[str, Tensor]:
    """Tensors of the context, which may need gradients and so must be arguments of `checkpoint`."""
    return {f.name: getattr(ctx, f.name) for f in fields(ctx) if isinstance(getattr(ctx, f.name), Tensor)}


def _through(blocks: Iterable[nn.Module], ctx: Context, names: Sequence[str], x: Stream, *beside: Tensor) -> Stream:
    return straight(blocks, x, replace(ctx, **dict(zip(names, beside, strict=True))))


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _random_state(args: Sequence[Tensor]) -> list[tuple[torch.device, Tensor]]:
    """Random states of the CPU and of the arguments' devices."""
    cuda = {t.device for t in args if t.is_cuda}
    return [(torch.device("cpu"), torch.get_rng_state()), *((d, torch.cuda.get_rng_state(d)) for d in cuda)]


def _autocast(args: Sequence[Tensor]) -> list[tuple[str, bool, torch.dtype]]:
    kinds = {t.device.type for t in args}
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextmanager
def _as_before(
    random: list[tuple[torch.device, Tensor]], autocast: list[tuple[str, bool, torch.dtype]]
) -> Iterator[None]:
    cuda = [device for device, _ in random if device.type == "cuda"]
    with torch.random.fork_rng(cuda):
        for device, state in random:
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        kept = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind, *_ in autocast]
        try:
            _set_autocast(autocast)
            yield
        finally:
            _set_autocast(kept)


def _set_autocast(settings: list[tuple[str, bool, torch.dtype]]) -> None:
    for kind, enabled, dtype in settings:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _leaves(outs: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves that gradients of these tensors reach."""
    todo, seen, found = [o.grad_fn for o in outs], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(following for following, _ in node.next_functions)
    return found
