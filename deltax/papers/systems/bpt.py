"""Blockwise Parallel Transformer for Large Context Models. Liu, Abbeel, 2023. arXiv:2305.19370

FlashAttention's tiles, but the feed-forward branch of a tile of queries follows as soon as its attention is done, and
the tile is checkpointed as a whole.

With attention tiled, the rest of the block fills the memory: a norm, a projection, and a hidden layer four times as
wide as the stream, each for the whole sequence. None of them looks at another position. So a tile of queries goes
through all of the block at once, and of all that only the tile's end is kept. Its queries are the outer loop, as two
months later in FlashAttention-2, whose kernel is filled in here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deltax import Part, claim, paper, part
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.language.softmax_attention import Attention, attend
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.systems.activation_checkpointing import checkpoint, tensors
from deltax.papers.systems.flash_attention import flash
from deltax.papers.systems.flash_attention_2 import flash_attention_2
from deltax.papers.systems.memory_efficient_attention import memory_efficient
from deltax.parts.agreement import Capped, slope
from deltax.parts.context import Context
from deltax.parts.mlp import MLP
from deltax.parts.scores import causal, window
from deltax.parts.stack import Block, PostNorm, PreNorm, Stack, in_turn
from deltax.parts.tiles import tiles
from deltax.shapes import Heads, Keys, Stream, Values

Held = tuple[Tensor, ...]


@needs(beside={"mixer": ("Attention",)})
def tile_by_tile(block: Block, x: Stream, ctx: Context, *, tile: int = 64) -> Stream:
    """Both branches for one tile of the stream after another; the keys and values come first, for all of it.

    Stream (B, T, D) -> (B, T, D), the block's own to rounding: all but the kernel must act position by position. For
    the backward pass a block keeps its input, queries, keys and values; each tile goes through once more there. While
    decoding, one branch follows the other. Raises UserError for a tile below 1 and for a mixer that is not `Attention`.
    """
    if ctx.state is not None:
        return in_turn(block, x, ctx)
    q, k, v = heads(block, x, ctx, tile)
    rules, rows = block.mixer.rules(ctx), tiles(x.shape[1], tile)
    kernels = (partial(block.mixer.kernel, rules=rules.of_queries(r, x.device)) for r in rows)
    return each_tile(block, x, ctx, tile, [(kernel, (own, k, v)) for kernel, own in zip(kernels, q, strict=True)])


def heads(block: Block, x: Stream, ctx: Context, tile: int) -> tuple[list[Tensor], Keys, Values]:
    """The queries of each tile, and the keys and values of all, each tile checkpointed."""
    if not isinstance(block.mixer, Attention):
        raise UserError(f"bpt takes attention apart in tiles; a {type(block.mixer).__name__} has no keys to go over")
    found = []
    for rows, own in zip(tiles(x.shape[1], tile), x.split(tile, 1), strict=True):
        beside = tensors(_rows(ctx, rows, x.device))
        found.append(checkpoint(partial(_heads, block, ctx, tuple(beside)), own, *beside.values()))
    q, k, v = zip(*found, strict=True)
    return list(q), torch.cat(k, 1), torch.cat(v, 1)


def each_tile(
    block: Block, x: Stream, ctx: Context, tile: int, attended: Iterable[tuple[Callable[..., Heads], Held]]
) -> Stream:
    """The rest of the block after attention, one tile of the stream after another, each checkpointed as a whole.

    attended: for each tile, how its heads come from some tensors, and those tensors.
    """
    through = []
    for rows, own, (looked, given) in zip(tiles(x.shape[1], tile), x.split(tile, 1), attended, strict=True):
        beside = tensors(_rows(ctx, rows, x.device))
        run = partial(_through, block, ctx, tuple(beside), looked, len(given))
        through.append(checkpoint(run, own, *given, *beside.values()))
    return torch.cat(through, 1)


def _heads(block: Block, ctx: Context, names: Sequence[str], x: Stream, *beside: Tensor) -> Held:
    handed: list[Stream] = []  # what the residual hands its branch
    block.mixer_residual(x, lambda y: handed.append(y) or y)
    return block.mixer.heads(handed[0], replace(ctx, **dict(zip(names, beside, strict=True))))


def _through(
    block: Block, ctx: Context, names: Sequence[str], attend: Callable[..., Heads], count: int, x: Stream, *rest: Tensor
) -> Stream:
    """One tile through both branches. `rest` are `count` tensors for `attend`, then those of the context."""
    given, beside = rest[:count], rest[count:]
    x = block.mixer_residual(x, lambda _: block.mixer.project.join(attend(*given)))
    return block.mlp_branch(x, replace(ctx, **dict(zip(names, beside, strict=True))))


def _rows(ctx: Context, rows: slice, device: torch.device) -> Context:
    """The context of some positions."""
    cut = lambda t: None if t is None else t[:, rows]
    counted = torch.arange(rows.start, rows.stop, device=device)
    positions = counted if ctx.positions is None else ctx.positions[..., rows]
    return replace(ctx, positions=positions, segments=cut(ctx.segments), place=cut(ctx.place))


@paper(on=(flash, memory_efficient), arxiv="2305.19370", year=2023)
def bpt(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # refuses a tile below 1 where it is written
    return recipe.fill("branches", tile_by_tile, tile=tile).fill("kernel", flash_attention_2, tile=tile)


def _block(tile: int, **parts: Any) -> tuple[Block, Block]:
    """A plain block and one that goes tile by tile, with the same weights, all random."""
    mixer = part(Attention, heads=3, **{"mask": causal, **parts.pop("attention", {})})
    settings = {"mixer": mixer, "mlp": part(MLP), "residual": part(PreNorm, norm=LayerNorm), **parts}
    kernel = part(flash_attention_2, tile=tile)
    plain = Block(12, **settings).double()
    tiled = Block(12, **{**settings, "mixer": part(mixer, kernel=kernel)}, branches=part(tile_by_tile, tile=tile))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    tiled.double().load_state_dict(plain.state_dict())
    return plain, tiled


def _agree(plain: Block, tiled: Block, ctx: Context, time: int = 31) -> None:
    """Output and every gradient, that of places too, are equal to 1e-12."""
    x = torch.randn(2, time, 12, dtype=torch.float64)
    place = torch.randn_like(x)
    weight, found = torch.randn_like(x), []
    for block in (plain, tiled):
        leaves = [t.clone().requires_grad_() for t in (x, place)]
        out = block(leaves[0], replace(ctx, place=leaves[1]))
        (out * weight).sum().backward()
        found.append([out, *(t.grad for t in leaves), *(p.grad for p in block.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@claim
def it_is_the_block():
    """Whatever the tile, output and the gradients of input and all weights are the plain block's, at any length."""
    torch.manual_seed(0)
    for tile in (7, 30, 64):
        for residual in (part(PreNorm, norm=LayerNorm), part(PostNorm, norm=LayerNorm)):
            _agree(*_block(tile, residual=residual), Context())


@claim
def whatever_the_rules():
    """Windows, penalties, padding, positions and learned scores come out as in the plain block."""
    torch.manual_seed(0)
    padded = (torch.arange(31) >= torch.tensor([[25], [31]])).long()
    shuffled = torch.stack([torch.randperm(31), torch.randperm(31)])
    for attention in ({"mask": part(window, width=4)}, {"score": slope}, {"score": part(Capped)}):
        for ctx in (Context(segments=padded), Context(positions=shuffled)):
            plain, tiled = _block(7, attention=attention)
            tiled.load_state_dict(plain.state_dict())
            _agree(plain.double(), tiled.double(), ctx)


@claim
def the_hidden_layer_is_never_whole():
    """At 1024 positions, width 64 and 8 tiles, no tensor is larger than the stream; the plain block makes one of 4."""
    for tile, largest in ((1024, 4), (128, 1)):
        block = Block(
            64,
            mixer=part(Attention, heads=1, mask=causal, kernel=part(flash_attention_2, tile=256)),
            mlp=part(MLP),
            residual=part(PreNorm, norm=LayerNorm),
            branches=part(tile_by_tile, tile=tile),
        )
        with _Largest() as seen:
            block(torch.randn(1, 1024, 64), Context()).sum().backward()
        assert seen.numbers == largest * 1024 * 64


class _Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@claim.measured(paper="up to 4 times longer sequences than with memory-efficient attention alone (abstract, Table 1)")
def longer_in_the_same_memory(lab):
    """In the memory of four blocks over FlashAttention at 2, 4 or 8 thousand positions, BPT takes twice as many.

    BPT is measured to 16,384 positions. Its bytes are linear in positions: the longest are read off the fitted line.
    Four blocks, since what is kept is kept of every block and what gradients pass through is there once, and tiles of
    256, were chosen after one block with tiles of 1024 was seen to be ruled by the gradients and the tile.
    """
    import numpy as np

    times = {"flash": (2048, 4096, 8192), "bpt": (2048, 4096, 8192, 16_384)}
    bytes_ = {name: [_peak(lab, name, 4, time) for time in at] for name, at in times.items()}
    slope, start = np.polyfit(times["bpt"], bytes_["bpt"], 1)
    longest = [float((budget - start) / slope) for budget in bytes_["flash"]]
    numbers = {"positions": times, "bytes": bytes_, "longest": longest}
    ratios = [reached / time for time, reached in zip(times["flash"], longest, strict=True)]
    return lab.at_least(ratios, 2, unit="times as long", numbers=numbers, figures=_drawn(lab, times, bytes_, 4))


@claim.measured(paper="activations of a layer are linear in length, 2 b s h bytes (Table 1)")
def memory_grows_with_length(lab):
    """The exponent of a block's peak memory, measured to 32,768 positions, is at least 0.5 lower than a plain one's."""
    import numpy as np

    times = {"plain": (1024, 2048, 4096), "bpt": (2048, 8192, 32_768)}
    runs = [{name: [_peak(lab, name, 1, time) for time in at] for name, at in times.items()} for _ in range(2)]
    exponent = lambda run, name: float(np.polyfit(np.log(times[name]), np.log(run[name]), 1)[0])
    gaps = [exponent(run, "plain") - exponent(run, "bpt") for run in runs]
    numbers = {"positions": times, "bytes": runs, "exponents": [{n: exponent(r, n) for n in times} for r in runs]}
    return lab.at_least(gaps, 0.5, unit="in the exponent", numbers=numbers, figures=_drawn(lab, times, runs[0], 1))


def _peak(lab: Any, name: str, depth: int, time: int) -> int:
    return lab.peak_memory(_train_blocks, name, depth, time, warm=(name, depth, 300))


def _train_blocks(name: str, depth: int, time: int) -> None:
    kernel = part(attend) if name == "plain" else part(flash_attention_2, tile=256)
    block = part(
        Block,
        mixer=part(Attention, heads=1, mask=causal, kernel=kernel),
        mlp=part(MLP),
        residual=part(PreNorm, norm=LayerNorm),
        branches=part(tile_by_tile, tile=256) if name == "bpt" else part(in_turn),
    )
    Stack(128, depth=depth, block=block)(torch.randn(1, time, 128, requires_grad=True), Context()).sum().backward()


def _drawn(lab: Any, times: dict[str, Sequence[int]], bytes_: dict[str, list[int]], depth: int) -> dict[str, str]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, measured in bytes_.items():
        axes.loglog(times[name], [b / 2**20 for b in measured], marker="o", label=name)
    axes.set(xlabel="positions", ylabel="peak memory, MiB")
    axes.legend(frameon=False)
    return {f"Memory of a forward and backward pass, depth {depth}, width 128, one head, causal": lab.figure(figure)}
