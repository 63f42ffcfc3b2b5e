"""Claims of activation-checkpointing: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.papers.systems.performance.activation_checkpointing import _through, activation_checkpointing, in_segments
from deltax.parts.attention.context import Context
from deltax.parts.model.stack import Stack, straight
from deltax.shapes import Stream


class _Draws(nn.Module):
    """A block with dropout, batch norm, and a second input in the context."""

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
    """One backward pass: the context's gradient, output, next random number, input and parameter gradients, buffers."""
    torch.manual_seed(1)
    out = stack(x, ctx)
    following = torch.rand(())
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = [p.grad for p in stack.parameters()]
    return [ctx.memory.grad, out, following, x.grad, *gradients, *stack.buffers()]


@claim
def the_same_to_the_bit():
    """For 1 and 7 blocks and four segmentations, output, gradients, dropout masks and batch statistics equal plain
    backpropagation's to the bit.

    The gradient of the context is summed in another order, so it is equal to 1e-13.
    """
    for depth, count in ((1, None), (7, None), (7, 1), (7, 7), (7, 3)):
        _same(*(_step(*twin) for twin in _twins(depth, (part(straight), part(in_segments, count=count)))))


@claim
def memory_grows_like_the_root_of_depth():
    """From 16 to 64 to 256 layers, the most saved tensors at most double each time, where plain ones grow 3.9 times."""
    once, plain = ([_most_kept(n, run) for n in (16, 64, 256)] for run in (in_segments, straight))
    assert once[1] <= 2 * once[0] and once[2] <= 2 * once[1]
    assert plain[1] >= 3.9 * plain[0] and plain[2] >= 3.9 * plain[1]
    assert once[2] < plain[2] / 5


@claim
def one_more_forward_pass():
    """With 7 blocks, a step runs 14 block forwards in any segmentation, and 7 in plain backpropagation."""
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
    """With dropout, output and gradients equal torch.utils.checkpoint's to the bit, reentrant or not."""
    from torch.utils.checkpoint import checkpoint as peer

    for reentrant in (True, False):
        (ours, x, ctx), (theirs, y, beside) = _twins(4, (part(in_segments, count=2), part(straight)))
        for block in (*ours.blocks, *theirs.blocks):
            block.norm = nn.Identity()
        theirs.passage = partial(_in_two, partial(peer, use_reentrant=reentrant))
        _same(_step(ours, x, ctx), _step(theirs, y, beside))


@claim.measured(paper="1000 layers of a residual network in 7 GB instead of 48 (abstract)")
def memory_grows_less_with_depth(lab):
    """From 4 to 64 of gpt's blocks, the exponent of peak training memory, less weights and gradients, is at least 0.3
    lower with checkpointing.

    A first version counted weights, and only memory above the peak of two blocks, and found the opposite.
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
    """A training step through 16 of gpt's blocks takes at most 1.5 times as long."""
    stacks = [_blocks(name, 16) for name in ("plain", "checkpointed")]
    found = [lab.ratio(*(partial(_train, stack) for stack in stacks), repeats=5).value for _ in range(5)]
    return lab.at_most(found, 1.5, unit="times as long")


def _blocks(name: str, depth: int) -> nn.Module:
    from deltax.papers.language.models.gpt import gpt

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
    """The most tensors saved for backward at one time, over a step through `depth` layers."""
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
