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

from deltax import Part, claim, paper, part
from deltax.errors import UserError
from deltax.parts.context import Context
from deltax.parts.stack import Stack, straight
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


class _Draws(nn.Module):
    """A block for the claims: random by dropout, with statistics by batch norm, told something beside the stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.Dropout(0.3)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + self.drop(torch.tanh(self.norm(self.linear(x + ctx.memory).flatten(0, 1)).view_as(x)))


def _twins(depth: int, passages: Sequence[Any]) -> list[tuple[Stack, Tensor, Context]]:
    torch.manual_seed(0)
    plain = Stack(5, depth=depth, block=part(_Draws)).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, memory = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    found = []
    for passage in passages:
        twin = Stack(5, depth=depth, block=part(_Draws), passage=passage).double()
        twin.load_state_dict(plain.state_dict())
        ctx = Context(memory=memory.clone().requires_grad_())
        found.append((twin, x.clone().requires_grad_(), ctx))
    return found


def _same(plain: list[Tensor], kept: list[Tensor]) -> None:
    torch.testing.assert_close(kept.pop(0), plain.pop(0), rtol=1e-13, atol=1e-13)
    assert len(plain) == len(kept) and all(torch.equal(a, b) for a, b in zip(plain, kept))


def _step(stack: Stack, x: Tensor, ctx: Context) -> list[Tensor]:
    """One backward pass: what came beside the stream has as gradient, the output, the next random number, the rest."""
    torch.manual_seed(1)
    out = stack(x, ctx)
    following = torch.rand(())
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = [p.grad for p in stack.parameters()]
    return [ctx.memory.grad, out, following, x.grad, *gradients, *stack.buffers()]


@claim
def the_same_to_the_bit():
    """Outputs, gradients, dropout masks and batch statistics are those of plain backpropagation, to the bit.

    The gradient of what every block reads beside the stream is summed in another order, so it is equal to rounding.
    """
    for depth, count in ((1, None), (7, None), (7, 1), (7, 7), (7, 3)):
        _same(*(_step(*twin) for twin in _twins(depth, (part(straight), part(in_segments, count=count)))))


@claim
def memory_grows_like_the_root_of_depth():
    """For 16, 64 and 256 layers the most tensors kept at once double each time; plainly, they grow four times."""
    once, plain = ([_most_kept(n, run) for n in (16, 64, 256)] for run in (in_segments, straight))
    assert once[1] <= 2 * once[0] and once[2] <= 2 * once[1]
    assert plain[1] >= 3.9 * plain[0] and plain[2] >= 3.9 * plain[1]
    assert once[2] < plain[2] / 5


@claim
def one_more_forward_pass():
    """A step runs every block twice forward where plain backpropagation runs it once, whatever the segments."""
    runs = []
    for passage in (part(straight), part(in_segments), part(in_segments, count=3)):
        [(stack, x, ctx)] = _twins(7, (passage,))
        times: list[nn.Module] = []
        for block in stack.blocks:
            block.register_forward_hook(lambda block, *_, times=times: times.append(block))
        _step(stack, x, ctx)
        runs.append(len(times))
    assert runs == [7, 14, 14]


@claim.parity(peer="torch.utils.checkpoint")
def equals_torch():
    """With dropout, outputs and gradients are those of torch.utils.checkpoint, reentrant or not, to the bit."""
    from torch.utils.checkpoint import checkpoint as peer

    for reentrant in (True, False):
        (ours, x, ctx), (theirs, y, beside) = _twins(4, (part(in_segments, count=2), part(straight)))
        for block in (*ours.blocks, *theirs.blocks):
            block.norm = nn.Identity()
        theirs.passage = partial(_in_two, partial(peer, use_reentrant=reentrant))
        _same(_step(ours, x, ctx), _step(theirs, y, beside))


@claim.measured(paper="1000 layers of a residual network in 7 GB instead of 48 (abstract)")
def memory_grows_less_with_depth(lab):
    """The exponent by which what training gpt's blocks holds at most, weights and their gradients aside, grows from 4
    to 64 of them, is at least 0.3 lower than without.

    A first version counted weights, and only what exceeds the peak of two blocks, and was opposite.
    """
    import numpy as np

    depths = (4, 16, 64)
    weights = sum(p.numel() for p in _blocks("plain", 1).parameters())
    peak = lambda name, depth: lab.peak_memory(_train_blocks, name, depth, 512, warm=(name, 1, 8)) - 8 * depth * weights
    runs = [{name: [peak(name, depth) for depth in depths] for name in ("plain", "checkpointed")} for _ in range(2)]
    exponents = [{name: float(np.polyfit(np.log(depths), np.log(run[name]), 1)[0]) for name in run} for run in runs]
    gaps = [run["plain"] - run["checkpointed"] for run in exponents]
    numbers = {"blocks": depths, "bytes": runs, "exponents": exponents}
    return lab.at_least(gaps, 0.3, unit="in the exponent", numbers=numbers)


@claim.measured(paper="the cost of one more forward pass for each batch (abstract)")
def it_costs_a_forward_pass(lab):
    """A step through 16 of gpt's blocks takes at most 1.5 times as long, as a forward pass is half a backward one."""
    stacks = [_blocks(name, 16) for name in ("plain", "checkpointed")]
    found = [lab.ratio(*(partial(_train, stack) for stack in stacks), repeats=5).value for _ in range(5)]
    return lab.at_most(found, 1.5, unit="times as long")


def _blocks(name: str, depth: int) -> nn.Module:
    from deltax.papers.language.gpt import gpt

    recipe = gpt + activation_checkpointing if name == "checkpointed" else gpt
    return recipe.put("model.stack.depth", depth)["model.stack"](96)


def _train(stack: nn.Module, time: int = 512) -> None:
    stack(torch.randn(1, time, 96, requires_grad=True), Context()).sum().backward()


def _train_blocks(name: str, depth: int, time: int) -> None:
    _train(_blocks(name, depth), time)


def _in_two(peer: Callable[..., Tensor], blocks: nn.ModuleList, x: Stream, ctx: Context) -> Stream:
    for run in (slice(0, 2), slice(2, 4)):
        x = peer(partial(_through, blocks[run], ctx, ("memory",)), x, ctx.memory)
    return x


def _most_kept(depth: int, run: Callable[..., Tensor]) -> int:
    """The most tensors held at one time for the backward pass, over a step through `depth` layers."""
    import weakref

    class Held:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    now, most = 0, 0

    def drop() -> None:
        nonlocal now
        now -= 1

    def pack(tensor: Tensor) -> Held:
        nonlocal now, most
        held, now = Held(tensor), now + 1
        weakref.finalize(held, drop)
        most = max(most, now)
        return held

    class Layer(nn.Module):
        def forward(self, x: Tensor, ctx: Context) -> Tensor:
            return torch.tanh(x)

    x = torch.randn(1, 1, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        run([Layer() for _ in range(depth)], x, Context()).sum().backward()
    return most
