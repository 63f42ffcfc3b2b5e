"""Training Deep Nets with Sublinear Memory Cost. Chen, Xu, Zhang, Guestrin, 2016. arXiv:1604.06174

Backpropagation, but of the forward pass only some boundaries are kept, and what lay between them is computed again.

What the backward pass needs is a function of what the forward pass was given. Keep about sqrt(n) of n activations, and
when the gradient arrives at a segment, run that segment once more: one forward pass buys memory that grows with the
square root of the depth. Every kernel that recomputes rather than stores descends from this trade.
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


def checkpoint(function: Callable[..., Any], *args: Tensor, buffers: Iterable[Tensor] = ()) -> Any:
    """function(*args), keeping only `args` for the backward pass, where it runs again (section 4).

    `function` gives a tensor or a tuple of them. Its second run draws the same random numbers and is under the same
    autocast as the first, and `buffers`, which it may write to, are left as the first run left them. Gradients reach
    `args`, and, in their `.grad`, the parameters that `function` closes over; any other tensor that needs a gradient
    must be among `args`. Raises UserError under torch.autograd.grad where there are such parameters.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    needed = any(t.requires_grad for t in args)
    leaf = None if needed else torch.empty(0, requires_grad=True)  # the output needs a gradient: parameters may
    return _Checkpoint.apply(function, tuple(buffers), leaf, *args)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], buffers: tuple[Tensor, ...], _: Tensor | None, *args: Tensor
    ) -> Any:
        ctx.function, ctx.buffers = function, buffers
        ctx.surroundings = partial(_as_before, _random_state(args), _autocast(args))
        ctx.save_for_backward(*args)
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        args = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        left = [b.clone() for b in ctx.buffers]
        with torch.enable_grad(), ctx.surroundings():
            out = ctx.function(*args)
        pairs = [(o, d) for o, d in zip(_tuple(out), d_out, strict=True) if o.requires_grad]
        if not Variable._execution_engine.is_checkpoint_valid() and _leaves(o for o, _ in pairs) - set(map(id, args)):
            raise UserError("what is checkpointed has parameters of its own: use .backward(), not torch.autograd.grad")
        torch.autograd.backward(*zip(*pairs, strict=True))
        for buffer, value in zip(ctx.buffers, left, strict=True):
            buffer.data.copy_(value)
        return None, None, None, *(t.grad for t in args)


def segments(count: int, of: int | None = None) -> list[slice]:
    """`count` things cut into `of` runs as even as can be, about sqrt(count) by default (section 4.2).

    Raises UserError for fewer than 1 or more than `count` segments.
    """
    of = round(math.sqrt(count)) if of is None else of
    if count and not 1 <= of <= count:
        raise UserError(f"{count} blocks are cut into 1 to {count} segments, not {of}")
    ends = [count * i // of for i in range(of + 1)] if count else [0]
    return [slice(a, b) for a, b in pairwise(ends)]


def in_segments(blocks: Iterable[nn.Module], x: Stream, ctx: Context, *, count: int | None = None) -> Stream:
    """Through all blocks, keeping the stream at the beginning of each of `count` segments, about sqrt(n) by default."""
    if ctx.state is not None:
        return straight(blocks, x, ctx)
    blocks, beside = list(blocks), tensors(ctx)
    for run in segments(len(blocks), count):
        through = partial(_through, blocks[run], ctx, tuple(beside))
        buffers = [b for block in blocks[run] for b in block.buffers()]
        x = checkpoint(through, x, *beside.values(), buffers=buffers)
    return x


def tensors(ctx: Context) -> dict[str, Tensor]:
    """What of the context may need a gradient, and so must be an argument of what is checkpointed."""
    return {f.name: getattr(ctx, f.name) for f in fields(ctx) if isinstance(getattr(ctx, f.name), Tensor)}


def _through(blocks: Iterable[nn.Module], ctx: Context, names: Sequence[str], x: Stream, *beside: Tensor) -> Stream:
    return straight(blocks, x, replace(ctx, **dict(zip(names, beside, strict=True))))


@paper(arxiv="1604.06174", year=2016)
def activation_checkpointing(recipe: Part, *, count: int | None = None) -> Part:
    return recipe.fill("passage", in_segments, count=count)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _random_state(args: Sequence[Tensor]) -> list[tuple[torch.device, Tensor]]:
    """Where the generators of the CPU, and of the device the arguments are on, stand."""
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
    """Identities of the leaves that gradients of these tensors would reach."""
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
