"""FlashAttention-2's two passes as Triton kernels: one program a tile of queries, or of keys on the way back.

Forward, a program keeps its queries and goes over the keys they see. Backward, one kernel keeps keys and values and
goes over the queries of every head that shares them, so nothing is added up between programs; another keeps queries.
Keys that no query of the tile may see are skipped where positions count from zero. Scores are in base 2.
"""

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.errors import UserError
from deltax.kernels.attention import sdpa
from deltax.kernels.terms import Terms, refusal, terms
from deltax.kernels.twins import twin
from deltax.papers.language.attention.softmax_attention import attend
from deltax.parts.attention.scores import Rules
from deltax.shapes import Heads, Keys, Queries, Values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@twin("papers.flash_attention:flash_attention", on="triton", why="its Triton kernel")
def flash(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, block: int | None = None) -> Heads:
    """`attend` in tiles that stay on chip, forward and backward; `sdpa` where `unfit` says why not.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Statistics and sums are in
    float32 at least. `block` is how many queries and keys a program takes; None is by the width of a head. Raises
    UserError for a block that is no power of two from 16 on.
    """
    rules = rules or Rules()
    if block is not None and (block < 16 or block & (block - 1)):
        raise UserError(
            f"block is a power of two from 16 on, as matrix units take it: give 16, 32, 64 or 128, not {block}"
        )
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if unfit(q, k, v, rules):
        return sdpa(q, k, v, rules)
    said = terms(rules, q.shape[1], k.shape[1], q.device)
    return _Flash.apply(*map(_unit_stride, (q, k, v)), said, block)


flash.reference = attend


def unfit(q: Queries, k: Keys, v: Values, rules: Rules) -> str:
    """Why these arguments are not for the Triton kernels; empty where they are."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it takes one floating-point type, not {', '.join(sorted({str(t.dtype) for t in (q, k, v)}))}"
    if q.shape[-1] > 256 or _bytes(q) > 1024:
        return f"a head of width {q.shape[-1]} in {q.dtype} does not fit on chip"
    if not all(t.numel() for t in (q, k)):
        return "there is nothing to attend to"
    return refusal(rules)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, said: Terms, block: int | None) -> Tensor:
        b, t, h = q.shape[:3]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        total = torch.empty((b, h, t), dtype=_wide(q), device=q.device)
        rows, columns = _tiles(q, block)
        _forward[(triton.cdiv(t, rows), b * h)](
            q, k, v, out, total, *_arguments(q, k, v, said), **_constants(q, k, said, rows, columns)
        )
        ctx.save_for_backward(q, k, v, out, total)
        ctx.said, ctx.block = said, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        b, t, h = q.shape[:3]
        s, g = k.shape[1:3]
        d_out = d_out.contiguous()
        reached = (d_out.to(total.dtype) * out.to(total.dtype)).sum(-1).transpose(1, 2).contiguous()
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        rows, columns = _tiles(q, ctx.block, back=True)
        given = (q, k, v, d_out, total, reached)
        arguments, constants = _arguments(q, k, v, ctx.said), _constants(q, k, ctx.said, rows, columns)
        _backward_keys[(triton.cdiv(s, columns), b * g)](*given, d_k, d_v, *arguments, **constants)
        _backward_queries[(triton.cdiv(t, rows), b * h)](*given, d_q, *arguments, **constants)
        return d_q, d_k, d_v, None, None


def _tiles(q: Tensor, block: int | None, back: bool = False) -> tuple[int, int]:
    """Queries and keys a program takes: fewer where a head's numbers are many bytes, so that all of it fits on chip."""
    if block is not None:
        return block, block
    row, half = _bytes(q), q.element_size() < 4
    if half and row <= 128:
        return (64, 64) if back else (128, 64)
    if half and row <= 512:
        return (64, 32) if row <= 256 else (32, 32)
    return (32, 32) if row <= 256 else (16, 16)


def _bytes(x: Tensor) -> int:
    return triton.next_power_of_2(x.shape[-1]) * x.element_size()


def _arguments(q: Tensor, k: Tensor, v: Tensor, said: Terms) -> tuple[Any, ...]:
    """What every kernel takes after its own tensors. A tensor that the rules lack is never read: q stands in."""
    at = [q if x is None else x.contiguous() for x in (said.q_at, said.k_at)]
    each = [x.shape[-1] if x is not None and x.ndim == 2 else 0 for x in (said.q_at, said.k_at)]
    segments = [x.contiguous() for x in said.segments] if said.segments else [q, q]
    slope = q if said.slope is None else said.slope.contiguous()
    strides = [x.stride(i) for x in (q, k, v) for i in range(3)]
    return (slope, *at, *each, *segments, *strides, q.shape[1], k.shape[1])


def _constants(q: Tensor, k: Tensor, said: Terms, rows: int, columns: int) -> dict[str, Any]:
    width = q.shape[-1]
    return {
        "HEADS": q.shape[2],
        "SHARED": q.shape[2] // k.shape[2],
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "ROWS": rows,
        "COLUMNS": columns,
        "SCALE": 1 / math.sqrt(width),
        "CAUSAL": said.causal,
        "WINDOW": said.width,
        "SLOPED": said.slope is not None,
        "PLACED": said.q_at is not None,
        "SEGMENTED": said.segments is not None,
        "WIDE": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
@no_type_check
def ruled(
    scores, i, j, T, S, b, h, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """A tile of scores (ROWS, COLUMNS) in base 2, -inf where a query must not look or the tile ends."""
    seen = (i[:, None] < T) & (j[None, :] < S)
    if PLACED:
        here = tl.load(q_at + b * q_each + i, mask=i < T, other=0)[:, None]
        there = tl.load(k_at + b * k_each + j, mask=j < S, other=0)[None, :]
    else:
        here, there = i[:, None], j[None, :]
    if SLOPED:
        scores -= (tl.load(slope + h) * tl.abs(here - there)).to(scores.dtype)
    if CAUSAL:
        seen &= here >= there
    if WINDOW > 0:
        seen &= here - there < WINDOW
    if SEGMENTED:
        mine = tl.load(q_segments + b * T + i, mask=i < T, other=0)
        theirs = tl.load(k_segments + b * S + j, mask=j < S, other=0)
        seen &= mine[:, None] == theirs[None, :]
    return tl.where(seen, scores * 1.4426950408889634, float("-inf"))


@triton.jit
@no_type_check
def keys_seen(
    start,
    S,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PLACED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From and to which key the queries from `start` on can look, by the mask alone."""
    low, high = 0, S
    if CAUSAL and not PLACED:
        high = tl.minimum(S, start + ROWS)
    if WINDOW > 0 and not PLACED:
        low = tl.maximum(0, start - WINDOW + 1) // COLUMNS * COLUMNS
    return low, high


@triton.jit
@no_type_check
def load_rows(x, start, stride, i, length, c, WIDTH: tl.constexpr):
    """Rows i of one head. -> (len(i), PADDED), zeros outside."""
    return tl.load(
        x + start + i[:, None] * stride + c[None, :], mask=(i[:, None] < length) & (c[None, :] < WIDTH), other=0.0
    )


@triton.jit
@no_type_check
def _forward(
    q, k, v, out, total, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S,
    HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    i, c = start + tl.arange(0, ROWS), tl.arange(0, PADDED)
    queries = load_rows(q, b * q_b + h * q_h, q_t, i, T, c, WIDTH)
    largest = tl.full([ROWS], float("-inf"), WIDE)
    gathered, weight = tl.zeros([ROWS, PADDED], WIDE), tl.zeros([ROWS], WIDE)
    low, high = keys_seen(start, S, CAUSAL, WINDOW, PLACED, ROWS, COLUMNS)
    for first in range(low, high, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        keys = load_rows(k, b * k_b + h // SHARED * k_h, k_t, j, S, c, WIDTH)
        values = load_rows(v, b * v_b + h // SHARED * v_h, v_t, j, S, c, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=WIDE) * SCALE
        scores = ruled(
            scores, i, j, T, S, b, h, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
            CAUSAL, WINDOW, SLOPED, PLACED, SEGMENTED,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(scores, 1))
        point = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - point[:, None])
        rescale = tl.exp2(largest - point)
        weight = weight * rescale + tl.sum(p, 1)
        gathered = gathered * rescale[:, None]
        gathered += tl.dot(p.to(values.dtype), values, input_precision="ieee", out_dtype=WIDE)
        largest = new
    fully_masked = weight == 0.0
    gathered = gathered / tl.where(fully_masked, 1.0, weight)[:, None]
    place = (b * T + i[:, None]) * HEADS * WIDTH + h * WIDTH + c[None, :]
    tl.store(out + place, gathered.to(out.dtype.element_ty), mask=(i[:, None] < T) & (c[None, :] < WIDTH))
    sums = tl.where(fully_masked, 0.0, largest + tl.log2(tl.where(fully_masked, 1.0, weight)))
    tl.store(total + (b * HEADS + h) * T + i, sums, mask=i < T)


@triton.jit
@no_type_check
def _backward_keys(
    q, k, v, d_out, total, reached, d_k, d_v, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S,
    HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dV = P' dO and dK = dS' Q of one tile of keys, over every head that shares them."""
    GROUPS: tl.constexpr = HEADS // SHARED
    start = tl.program_id(0) * COLUMNS
    b, g = (tl.program_id(1) // GROUPS).to(tl.int64), (tl.program_id(1) % GROUPS).to(tl.int64)
    j, c = start + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    keys = load_rows(k, b * k_b + g * k_h, k_t, j, S, c, WIDTH)
    values = load_rows(v, b * v_b + g * v_h, v_t, j, S, c, WIDTH)
    to_keys, to_values = tl.zeros([COLUMNS, PADDED], WIDE), tl.zeros([COLUMNS, PADDED], WIDE)
    low, high = 0, T
    if CAUSAL and not PLACED:
        low = start // ROWS * ROWS
    if WINDOW > 0 and not PLACED:
        high = tl.minimum(T, start + COLUMNS + WINDOW - 1)
    for h in range(g * SHARED, (g + 1) * SHARED):
        for first in range(low, high, ROWS):
            i = first + tl.arange(0, ROWS)
            queries = load_rows(q, b * q_b + h * q_h, q_t, i, T, c, WIDTH)
            given = load_rows(d_out, b * T * HEADS * WIDTH + h * WIDTH, HEADS * WIDTH, i, T, c, WIDTH)
            sums = tl.load(total + (b * HEADS + h) * T + i, mask=i < T, other=0.0)
            mean = tl.load(reached + (b * HEADS + h) * T + i, mask=i < T, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=WIDE) * SCALE
            scores = ruled(
                scores, i, j, T, S, b, h, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
                CAUSAL, WINDOW, SLOPED, PLACED, SEGMENTED,
            )  # fmt: skip
            p = tl.exp2(scores - sums[:, None])
            to_values += tl.dot(tl.trans(p.to(given.dtype)), given, input_precision="ieee", out_dtype=WIDE)
            d_p = tl.dot(given, tl.trans(values), input_precision="ieee", out_dtype=WIDE)
            d_scores = (p * (d_p - mean[:, None])).to(queries.dtype)
            to_keys += tl.dot(tl.trans(d_scores), queries, input_precision="ieee", out_dtype=WIDE)
    place = (b * S + j[:, None]) * GROUPS * WIDTH + g * WIDTH + c[None, :]
    inside = (j[:, None] < S) & (c[None, :] < WIDTH)
    tl.store(d_k + place, (to_keys * SCALE).to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + place, to_values.to(d_v.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _backward_queries(
    q, k, v, d_out, total, reached, d_q, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S,
    HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dQ = dS K of one tile of queries."""
    start = tl.program_id(0) * ROWS
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    i, c = start + tl.arange(0, ROWS), tl.arange(0, PADDED)
    queries = load_rows(q, b * q_b + h * q_h, q_t, i, T, c, WIDTH)
    given = load_rows(d_out, b * T * HEADS * WIDTH + h * WIDTH, HEADS * WIDTH, i, T, c, WIDTH)
    sums = tl.load(total + (b * HEADS + h) * T + i, mask=i < T, other=0.0)
    mean = tl.load(reached + (b * HEADS + h) * T + i, mask=i < T, other=0.0)
    to_queries = tl.zeros([ROWS, PADDED], WIDE)
    low, high = keys_seen(start, S, CAUSAL, WINDOW, PLACED, ROWS, COLUMNS)
    for first in range(low, high, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        keys = load_rows(k, b * k_b + h // SHARED * k_h, k_t, j, S, c, WIDTH)
        values = load_rows(v, b * v_b + h // SHARED * v_h, v_t, j, S, c, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=WIDE) * SCALE
        scores = ruled(
            scores, i, j, T, S, b, h, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
            CAUSAL, WINDOW, SLOPED, PLACED, SEGMENTED,
        )  # fmt: skip
        d_p = tl.dot(given, tl.trans(values), input_precision="ieee", out_dtype=WIDE)
        d_scores = tl.exp2(scores - sums[:, None]) * (d_p - mean[:, None])
        to_queries += tl.dot(d_scores.to(keys.dtype), keys, input_precision="ieee", out_dtype=WIDE)
    place = (b * T + i[:, None]) * HEADS * WIDTH + h * WIDTH + c[None, :]
    tl.store(d_q + place, (to_queries * SCALE).to(d_q.dtype.element_ty), mask=(i[:, None] < T) & (c[None, :] < WIDTH))
