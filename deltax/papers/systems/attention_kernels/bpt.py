"""Blockwise Parallel Transformer for Large Context Models. Liu, Abbeel, 2023. arXiv:2305.19370

FlashAttention, but each checkpointed tile of queries goes through the feed-forward branch right after its attention.

With memory-efficient attention, the norms, the projections and the MLP's hidden layer (4 times as wide as the stream)
take the most memory, each for the whole sequence. All of them act position by position, so a tile of queries goes
through the whole block at once, and only its output is kept. Queries are the outer loop, so the kernel is
FlashAttention-2's, which appeared two months later.
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
    """A block, tile by tile over the queries. Stream (B, T, D) -> (B, T, D).

        k, v = keys and values of the whole sequence, computed tile by tile
        for each tile i of queries:
            A_i = x_i + attention(q_i, k, v)          # FlashAttention-2
            out_i = A_i + MLP(A_i)                    # norms as in the block
        in backward: recompute tile i from x_i, q_i, k and v, then back-propagate through it

    The result equals the block's to rounding, if all but the kernel acts position by position. A block saves its input,
    queries, keys and values for backward. While decoding, the plain block is run. Raises UserError for a tile below 1
    and for a mixer that is not `Attention`.
    """
    if ctx.state is not None or not x.shape[1]:
        return in_turn(block, x, ctx)  # decoding: a few positions, and nothing is kept for backward
    q, k, v = heads(block, x, ctx, tile)  # q a list of (B, tile, H, K); k and v whole, (B, T, G, K)
    rules, rows = block.mixer.rules(ctx), tiles(x.shape[1], tile)
    kernels = (partial(block.mixer.kernel, rules=rules.of_queries(r, x.device)) for r in rows)
    return each_tile(block, x, ctx, tile, [(kernel, (own, k, v)) for kernel, own in zip(kernels, q, strict=True)])


@paper(on=(flash, memory_efficient), arxiv="2305.19370", year=2023)
def bpt(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # raises here, not at build, for a tile below 1
    return recipe.fill("branches", tile_by_tile, tile=tile).fill("kernel", flash_attention_2, tile=tile)


def heads(block: Block, x: Stream, ctx: Context, tile: int) -> tuple[list[Tensor], Keys, Values]:
    """Queries of each tile, and keys and values (B, T, G, K) of all positions, each tile checkpointed."""
    if not isinstance(block.mixer, Attention):
        raise UserError(
            f"bpt tiles softmax attention, and this mixer is {type(block.mixer).__name__}: use it with Attention"
        )
    found = []
    for rows, own in zip(tiles(x.shape[1], tile), x.split(tile, 1), strict=True):
        beside = tensors(_rows(ctx, rows, x.device))
        # projections of one tile: normed input and (B, tile, D) intermediates are recomputed in backward
        found.append(checkpoint(partial(_heads, block, ctx, tuple(beside)), own, *beside.values()))
    q, k, v = zip(*found, strict=True)
    return list(q), torch.cat(k, 1), torch.cat(v, 1)


def each_tile(
    block: Block, x: Stream, ctx: Context, tile: int, attended: Iterable[tuple[Callable[..., Heads], Held]]
) -> Stream:
    """The block after attention, one checkpointed tile of the stream after the other.

    attended: for each tile, a function that gives its heads (B, tile, H, K), and the function's tensor arguments.
    """
    through = []
    for rows, own, (looked, given) in zip(tiles(x.shape[1], tile), x.split(tile, 1), attended, strict=True):
        beside = tensors(_rows(ctx, rows, x.device))
        # one checkpoint a tile: the (B, tile, 4D) hidden layer is recomputed in backward
        run = partial(_through, block, ctx, tuple(beside), looked, len(given))
        through.append(checkpoint(run, own, *given, *beside.values()))
    return torch.cat(through, 1)


def _heads(block: Block, ctx: Context, names: Sequence[str], x: Stream, *beside: Tensor) -> Held:
    handed: list[Stream] = []  # the branch's input: normed for pre-norm, x itself for post-norm
    block.mixer_residual(x, lambda y: handed.append(y) or y)
    return block.mixer.heads(handed[0], replace(ctx, **dict(zip(names, beside, strict=True))))


def _through(
    block: Block, ctx: Context, names: Sequence[str], attend: Callable[..., Heads], count: int, x: Stream, *rest: Tensor
) -> Stream:
    """One tile through both residual branches. `rest`: `count` arguments of `attend`, then the context's tensors."""
    given, beside = rest[:count], rest[count:]
    # A_i = x_i + attention, then out_i = A_i + MLP(A_i), norms as the block has them
    x = block.mixer_residual(x, lambda _: block.mixer.project.join(attend(*given)))
    return block.mlp_branch(x, replace(ctx, **dict(zip(names, beside, strict=True))))


def _rows(ctx: Context, rows: slice, device: torch.device) -> Context:
    """The context of some positions."""
    cut = lambda t: None if t is None else t[:, rows]
    counted = torch.arange(rows.start, rows.stop, device=device)
    positions = counted if ctx.positions is None else ctx.positions[..., rows]
    return replace(ctx, positions=positions, segments=cut(ctx.segments), place=cut(ctx.place))
