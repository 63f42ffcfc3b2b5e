"""Ring Attention with Blockwise Transformers for Near-Infinite Context. Liu, Zaharia, Abbeel, 2023. arXiv:2310.01889

BPT, but each device holds one block of queries, keys and values, and the key-value blocks travel around a ring.

Tiles merge in any order, so a process can attend to the blocks in the order in which they arrive. Sending overlaps with
computing and costs no time where a block is long enough (c >= F/B: FLOPS over bandwidth). Each process holds 1/P of
the sequence. In backward, keys and values travel once more, and their gradients one step behind.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from deltax import Part, paper
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.bpt import bpt, each_tile, heads
from deltax.papers.systems.attention_kernels.flash_attention import gradients, reached
from deltax.papers.systems.attention_kernels.flash_attention_2 import look_at_all, nothing, softmax_given
from deltax.papers.systems.attention_kernels.memory_efficient_attention import finish, merge
from deltax.papers.systems.attention_kernels.online_softmax import log_sum
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import Rules
from deltax.parts.attention.tiles import as_autocast, tiles, wide
from deltax.parts.distributed.ring import Held, Ring, here
from deltax.parts.model.stack import Block, in_turn
from deltax.shapes import Heads, Keys, Queries, Stream, Values


def ring_attention(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 64) -> Heads:
    """`attend` over a sequence of which each member of the ring `here()` holds a share.

        seen = tile of no keys
        for t in 0 .. P-1:                            # block (i - t) mod P is here
            start sending (k, v) to process i + 1 and receiving from i - 1
            seen = merge(seen, attention tiles of q and (k, v))
            (k, v) = received
        out = divide(seen)
        backward: (k, v) travel again with (dk, dv) behind them; dq adds up here

    Queries (B, T/P, H, K), keys and values (B, T/P, G, K) -> (B, T/P, H, K). The rules hold the positions of this share
    in the whole sequence; segments are given on all members or on none. All members call, and go backward, together.
    Gradients of a score's learned parameters are this member's part of the sum. Raises UserError for a tile below 1,
    for rules without positions, and on every member where shares differ in shape; BrokenRing for a member that dies or
    stalls.
    """
    ring, rules = here(), rules or Rules()
    q, k, v = as_autocast(q, k, v)
    block = _block(ring, k, v, rules)
    _same_everywhere(ring, block)
    return _Ring.apply(q, k, v, rules, tile, ring, block[2:], *rules.learned.values())


ring_attention.reference = attend  # on a ring of one


@needs(beside={"mixer": ("Attention",)})
def around_then_tiles(block: Block, x: Stream, ctx: Context, *, tile: int = 64) -> Stream:
    """`tile_by_tile`, but attention is done for all tiles first, so that keys travel once and not once a tile."""
    if ctx.state is not None or not x.shape[1]:
        return in_turn(block, x, ctx)
    q, k, v = heads(block, x, ctx, tile)
    out = block.mixer.kernel(torch.cat(q, 1), k, v, block.mixer.rules(ctx))
    return each_tile(block, x, ctx, tile, [(_as_it_is, (own,)) for own in out.split(tile, 1)])


@paper(on=bpt, arxiv="2310.01889", year=2023)
def ring(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # raises here, not at build, for a tile below 1
    return recipe.fill("branches", around_then_tiles, tile=tile).fill("kernel", ring_attention, tile=tile)


def travel(ring: Ring, block: Held) -> Iterator[Held]:
    """Yields every member's block once, its own first. The next block is received while one is used (section 3)."""
    for step in range(ring.size):
        # isend/irecv start before the block is used; the last block needs no successor
        arrival = ring.pass_on(block) if step + 1 < ring.size else None
        yield block
        if arrival:
            block = arrival()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules, tile: int, ring: Ring, beside: Held, *learned: Tensor
    ) -> Tensor:
        seen = nothing(q)
        for keys, values, *where in travel(ring, (k, v, *beside)):
            with record_function("ring.attend"):
                seen = merge(seen, look_at_all(q, keys, values, _of(rules, where), tile))
            del keys, values  # frees the block before the next one arrives
        out = finish(seen).to(q.dtype)
        # saved: this process's share and L (B, H, T/P); no other block
        ctx.save_for_backward(q, k, v, out, log_sum(seen.seen), *beside)
        ctx.rules, ctx.tile, ctx.ring = rules, tile, ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, *beside = ctx.saved_tensors
        weights = lambda scores, rows: softmax_given(scores, total[..., rows])
        taken = reached(d_out, out)
        d_q = torch.zeros_like(q, dtype=wide(q))
        d_learned = [torch.zeros_like(p) for p in ctx.rules.learned.values()]
        arrival = None
        for keys, values, *where in travel(ctx.ring, (k, v, *beside)):
            with record_function("ring.attend"):
                rules = _of(ctx.rules, where)
                own_q, *own = gradients(q, keys, values, rules, ctx.tile, weights, d_out, taken)
            _add(d_q, own_q)  # dQ stays here
            for sum_, more in zip(d_learned, own[2:], strict=True):
                sum_ += more
            # dK and dV follow their block around the ring and are home after P passes
            gathered = tuple(map(_add, arrival(), own[:2])) if arrival else tuple(own[:2])
            arrival = ctx.ring.pass_on(gathered)
            del keys, values, own_q, own, gathered  # frees the block before the next one arrives
        d_k, d_v = arrival()
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None, *d_learned


def _add(sum_: Tensor, more: Tensor) -> Tensor:
    return sum_.add_(more)


def _block(ring: Ring, k: Keys, v: Values, rules: Rules) -> Held:
    """The tensors that travel: keys, values, their positions, and their segments where there are any."""
    if ring.size > 1 and (rules.q_at is None or rules.k_at is None):
        raise UserError(
            f"ring attention over {ring.size} processes needs positions: pass Context(positions=share(all, ring, -1))"
        )
    at = torch.arange(k.shape[1], device=k.device) if rules.k_at is None else rules.k_at
    return k, v, at, *(() if rules.k_segments is None else (rules.k_segments,))


def _of(rules: Rules, where: list[Tensor]) -> Rules:
    """The rules for a block at other positions."""
    return replace(rules, k_at=where[0], k_segments=where[1] if len(where) > 1 else None)


def _same_everywhere(ring: Ring, block: Held) -> None:
    """Compares the shapes on all members, once for each shape: a transfer of unequal blocks can hang."""
    facts = [n for t in block for n in (t.ndim, t.element_size(), *t.shape)]
    agreed = ring.__dict__.setdefault("_agreed", set())
    if ring.size == 1 or tuple(facts) in agreed:
        return
    lengths = [n[0] for n in ring.gather([len(facts)])]
    all_ = ring.gather((facts + [0] * max(lengths))[: max(lengths)])
    for rank, theirs in enumerate(all_):
        if theirs != all_[0]:
            shapes = "; ".join(f"process {i}: {found[2 : 2 + found[0]]}" for i, found in ((0, all_[0]), (rank, theirs)))
            raise UserError(
                f"ring attention needs equal shares, all with segments or none, not keys of {shapes}: pad the sequence"
            )
    agreed.add(tuple(facts))


def _as_it_is(heads: Heads) -> Heads:
    return heads
