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

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.systems.attention_kernels.flash_attention import flash
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_attention_2
from deltax.papers.systems.attention_kernels.memory_efficient_attention import memory_efficient
from deltax.papers.systems.performance.activation_checkpointing import checkpoint, tensors
from deltax.parts.attention.context import Context
from deltax.parts.attention.tiles import tiles
from deltax.parts.model.stack import Block, in_turn
from deltax.shapes import Heads, Keys, Stream, Values

Held = tuple[Tensor, ...]


@needs(beside={"mixer": ("Attention",)})
def tile_by_tile(block: Block, x: Stream, ctx: Context, *, tile: int = 64) -> Stream:
    """Both branches for one tile of the stream after another; the keys and values come first, for all of it.

    Stream (B, T, D) -> (B, T, D), the block's own to rounding: all but the kernel must act position by position. For
    the backward pass a block keeps its input, queries, keys and values; each tile goes through once more there. While
    decoding, one branch follows the other. Raises UserError for a tile below 1 and for a mixer that is not `Attention`.
    """
    if ctx.state is not None or not x.shape[1]:
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
