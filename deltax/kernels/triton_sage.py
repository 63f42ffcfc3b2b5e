"""SageAttention and SageAttention2 as Triton kernels: one program a tile of 128 queries, over 64 keys at a time.

Rounding is the papers' own, in torch; the kernels multiply 8-bit integers in 32 bits. Triton has no 4-bit product, so
4-bit numbers travel as 8-bit ones: the values of SageAttention2's INT4, at the speed of INT8, as in the released code.
Sums of 8-bit floats are started anew for each block of keys; in how many bits the unit keeps one is the hardware's.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltax.kernels.terms import Terms, refusal, terms
from deltax.kernels.triton_attention import keys_seen, load_rows, ruled
from deltax.kernels.twins import twin
from deltax.papers.systems.attention_kernels.sage_attention import (
    KEYS,
    QUERIES,
    Quantized,
    for_inference,
    in_8_bits,
    sage_attention,
)
from deltax.papers.systems.attention_kernels.sage_attention_2 import LARGEST, in_4_bits, sage_attention_2, small_values
from deltax.parts.attention.scores import Rules
from deltax.shapes import Heads, Keys, Queries, Values


@twin("papers.sage_attention:sage_attention", on="triton", why="its Triton kernel")
def sage(
    q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, queries: int = QUERIES, keys: int = KEYS
) -> Heads:
    """`sage_attention` in tiles that stay on chip, or itself where `unfit` says why not. Shapes and errors are its."""

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        said = terms(rules, q.shape[1], k.shape[1], q.device)
        return _attend(*in_8_bits(q, k, queries, keys), v.half(), said)

    return _or(compute, sage_attention, q, k, v, rules or Rules(), queries=queries, keys=keys)


sage.looks_ahead = sage_attention.looks_ahead


@twin("papers.sage_attention_2:sage_attention_2", on="triton", why="its Triton kernel")
def sage_2(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, largest: int = 7) -> Heads:
    """`sage_attention_2` in tiles that stay on chip, itself where `unfit` says why not. Shapes and errors are its."""

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        said = terms(rules, q.shape[1], k.shape[1], q.device)
        whole, keys, mean, smoothed = in_4_bits(q, k, largest)
        each = mean[:, ::QUERIES].unflatten(2, (k.shape[2], -1))
        added = torch.einsum("bngck,bsgk->bgcns", each, smoothed).flatten(1, 2).contiguous()
        values, scale = small_values(v)
        out = _attend(whole, keys, values, said, added)
        return out * scale.repeat_interleave(q.shape[2] // k.shape[2], 2) / LARGEST

    return _or(compute, sage_attention_2, q, k, v, rules or Rules(), largest=largest)


sage_2.looks_ahead = sage_attention_2.looks_ahead


def unfit(q: Queries, k: Keys, v: Values, rules: Rules) -> str:
    """Why these arguments are not for the Triton kernels; empty where they are."""
    if q.shape[-1] > 256:
        return f"a head of width {q.shape[-1]} does not fit on chip"
    if not all(t.numel() for t in (q, k)):
        return "there is nothing to attend to"
    return refusal(rules)


def _or(
    compute: Callable[..., Heads],
    reference: Callable[..., Heads],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    **given: Any,
) -> Heads:
    if unfit(q, k, v, rules):
        return reference(q, k, v, rules, **given)
    return for_inference(compute, q, k, v, rules)


def _attend(q: Quantized, k: Quantized, v: Values, said: Terms, added: Tensor | None = None) -> Heads:
    """added (B, H, blocks of queries, S) are scores on top. -> (B, T, H, K) in float32."""
    b, t, h, width = q.whole.shape
    s, g = k.whole.shape[1:3]
    half = v.dtype == torch.float16
    out = torch.empty(q.whole.shape, dtype=torch.float32, device=v.device)
    whole = [x.whole.to(torch.int8).contiguous() for x in (q, k)]
    steps = [x.step[..., 0].transpose(1, 2).contiguous() for x in (q, k)]
    at = [out if x is None else x.contiguous() for x in (said.q_at, said.k_at)]
    each = [x.shape[-1] if x is not None and x.ndim == 2 else 0 for x in (said.q_at, said.k_at)]
    segments = [x.contiguous() for x in said.segments] if said.segments else [out, out]
    slope = out if said.slope is None else said.slope.contiguous()
    _sage[(triton.cdiv(t, QUERIES), b * h)](
        *whole, *steps, v.contiguous(), out, out if added is None else added, slope, *at, *each, *segments, t, s,
        HEADS=h, SHARED=h // g, WIDTH=width, PADDED=max(32, triton.next_power_of_2(width)), ROWS=QUERIES, COLUMNS=KEYS,
        CAUSAL=said.causal, WINDOW=said.width, SLOPED=said.slope is not None, PLACED=said.q_at is not None,
        SEGMENTED=said.segments is not None, ADDED=added is not None,
        WEIGHT=1.0 if half else LARGEST, SUMS=tl.float16 if half else tl.float32,
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _sage(
    q, k, q_step, k_step, v, out, added, slope, q_at, k_at, q_each, k_each, q_segments, k_segments, T, S,
    HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr,
    SEGMENTED: tl.constexpr, ADDED: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // SHARED
    start = tl.program_id(0) * ROWS
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    g = h // SHARED
    i, c = start + tl.arange(0, ROWS), tl.arange(0, PADDED)
    queries = load_rows(q, b * T * HEADS * WIDTH + h * WIDTH, HEADS * WIDTH, i, T, c, WIDTH)
    step = tl.load(q_step + (b * HEADS + h) * T + i, mask=i < T, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    gathered, weight = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS], tl.float32)
    low, high = keys_seen(start, S, CAUSAL, WINDOW, PLACED, ROWS, COLUMNS)
    for first in range(low, high, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        keys = load_rows(k, b * S * GROUPS * WIDTH + g * WIDTH, GROUPS * WIDTH, j, S, c, WIDTH)
        values = load_rows(v, b * S * GROUPS * WIDTH + g * WIDTH, GROUPS * WIDTH, j, S, c, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32)
        scores *= step[:, None] * tl.load(k_step + (b * GROUPS + g) * S + j, mask=j < S, other=0.0)[None, :]
        if ADDED:
            block = (b * HEADS + h) * tl.cdiv(T, ROWS) + tl.program_id(0)
            scores += tl.load(added + block * S + j, mask=j < S, other=0.0)[None, :]
        scores = ruled(
            scores, i, j, T, S, b, h, slope, q_at, k_at, q_each, k_each, q_segments, k_segments,
            CAUSAL, WINDOW, SLOPED, PLACED, SEGMENTED,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(scores, 1))
        point = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - point[:, None])
        rescale = tl.exp2(largest - point)
        weight = weight * rescale + tl.sum(p, 1)
        block_sum = tl.dot((p * WEIGHT).to(values.dtype), values, out_dtype=SUMS)
        gathered = gathered * rescale[:, None] + block_sum.to(tl.float32)
        largest = new
    gathered = gathered / tl.where(weight == 0.0, 1.0, weight)[:, None]
    place = (b * T + i[:, None]) * HEADS * WIDTH + h * WIDTH + c[None, :]
    tl.store(out + place, gathered, mask=(i[:, None] < T) & (c[None, :] < WIDTH))
