"""SageAttention2: Efficient Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization.
Zhang, Huang, Zhang, Wei, Zhu, Chen, 2024. arXiv:2411.10958

SageAttention, but smoothed queries and keys are INT4 with a scale a thread's group, and P V is FP8.

INT4 has 15 values, so queries are smoothed too: each block of queries loses its mean, whose scores are one row a block
and are added again exactly. A scale for each token would be too slow inside a matrix unit's tile; the tokens whose
scores one thread holds share a scale. P lies in [0, 1] and has a fixed scale; V has one a channel. The matrix unit
sums FP8 products in 22 bits, so each block of keys is summed apart and added in 32 bits. Means and scales are shared
with later tokens. Simulated as in SageAttention. The released code has kernels for INT8 Q K' only (`largest=127`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.systems.attention_kernels.sage_attention import (
    KEYS,
    QUERIES,
    Quantized,
    for_inference,
    gather,
    product,
    quantize,
    sage,
    said_to,
    smooth,
)
from deltax.parts.attention.scores import Rules
from deltax.shapes import Heads, Keys, Queries, Scores, Values

WARP = 32  # queries of one warp
LARGEST = 448.0  # the largest FP8 E4M3 number


def sage_attention_2(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, largest: int = 7) -> Heads:
    """`attend` with INT4 scores (`largest=127` for INT8) and FP8 values, queries and keys smoothed.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Raises UserError for a
    backward pass.
    """

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        scores = rules(scores_in_4_bits(q, k, rules, largest=largest))
        return gather(scores, in_8_bit_floats(v, q.shape[2]))

    return for_inference(compute, q, k, v, rules or Rules())


sage_attention_2.looks_ahead = "queries and keys of a block share means and scales, later positions included"


@paper(on=sage, arxiv="2411.10958", year=2024, trains=False)
def sage_2(recipe: Part, *, largest: int = 7) -> Part:
    return recipe.fill("kernel", sage_attention_2, largest=largest)


def scores_in_4_bits(q: Queries, k: Keys, rules: Rules, *, largest: int = 7) -> Scores:
    """Q K' / sqrt(K), both smoothed and rounded to integers up to `largest`, plus the mean queries' scores (Eq. 4)."""
    queries, keys, mean, smoothed = in_4_bits(q, k, largest)
    # S = gamma(Q) gamma(K)' + q-mean gamma(K)', the second term without rounding
    scores = product(queries, keys) + _said(mean, smoothed)
    return scores if rules.is_additive else scores + said_to(q, smooth(k)[1]) / math.sqrt(q.shape[-1])


def in_4_bits(q: Queries, k: Keys, largest: int = 7) -> tuple[Quantized, Quantized, Queries, Keys]:
    """Smoothed queries / sqrt(K) and smoothed keys as integers; then the mean of each query and the unrounded smoothed
    keys.

    The scores of the last two are added without rounding.
    """
    queries, mean = smooth_queries(q / math.sqrt(q.shape[-1]))
    keys, _ = smooth(k)
    groups = query_threads(q.shape[1]), key_threads(k.shape[1])
    return quantize(queries, groups[0], largest), quantize(keys, groups[1], largest), mean, keys


def smooth_queries(q: Queries, size: int = QUERIES) -> tuple[Queries, Queries]:
    """Queries minus the mean of their block of `size`, and that mean for each query (section 3.2). Two (B, T, H, K)."""
    # gamma(Q) = Q - q-mean, one mean a block
    pieces = q.split(size, 1)
    mean = torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in pieces], 1)
    return q - mean, mean


def query_threads(length: int) -> Tensor:
    """(length,), the group of each query: of a warp's 32, those with equal index mod 8 (section 3.3)."""
    token = torch.arange(length)
    # mma holds rows i and i + 8 in one thread: 8 scales a warp
    return token // WARP * 8 + token % 8


def key_threads(length: int) -> Tensor:
    """(length,), the group of each key: of a block of 64, those with equal (index mod 8) // 2 (section 3.3)."""
    token = torch.arange(length)
    # and two neighbouring columns: 4 scales a block
    return token // KEYS * 4 + token % 8 // 2


def in_8_bit_floats(v: Values, heads: int) -> Callable[[Tensor, slice], Heads]:
    """P and V in FP8, with a fixed scale for P and one a channel for V, summed in two levels (section 3.4)."""
    small, scale = (x.float().repeat_interleave(heads // v.shape[2], 2) for x in small_values(v))

    def values(weights: Tensor, columns: slice) -> Heads:
        pieces = zip(_rounded(weights * LARGEST).split(32, -1), small[:, columns].split(32, 1))
        sums = torch.zeros(())
        for p, some in pieces:
            # 32 products at a time, truncated to 22 bits
            sums = in_22_bits(sums + torch.einsum("bhts,bshk->bthk", p, some))
        # `gather` adds the blocks in 32 bits: the second level
        return sums.to(weights.dtype) * scale / LARGEST

    return values


def small_values(v: Values) -> tuple[Tensor, Tensor]:
    """Values (B, S, G, K) in FP8 E4M3, and the scale (B, 1, G, K) of each channel, max |v| / 448."""
    peak = v.abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(len(v), 1, *v.shape[2:])
    scale = (peak / LARGEST).masked_fill(peak == 0, 1.0)
    return (v / scale).to(torch.float8_e4m3fn), scale


def in_22_bits(x: Tensor) -> Tensor:
    """Float32 truncated to 13 bits of mantissa: the matrix unit's accumulator for FP8 products."""
    # 1 + 8 + 13 bits: the low 10 of the mantissa's 23 are cleared
    return (x.float().view(torch.int32) & ~0x3FF).view(torch.float32)


def _said(q: Queries, k: Keys) -> Scores:
    return torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()
