"""SageAttention2: Efficient Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization.
Zhang, Huang, Zhang, Wei, Zhu, Chen, 2024. arXiv:2411.10958

SageAttention, but queries are smoothed too, and meet keys in 4 bits with a step for what one thread holds, and weights
meet values in 8-bit floats.

Fifteen numbers hold a row only if it has no outliers, so each block of queries loses its mean as well; what that mean
says to the keys is one row of scores, and is added again. A step for each token would have to be looked up in the
middle of a matrix unit's tile; the tokens whose scores one thread of it holds can share a step at no such cost. Weights
lie in [0, 1], so their scale is fixed; values have one for each channel. The unit sums 8-bit floats in 22 bits, so each
block of keys is summed apart and then added in 32. Means and scales are shared by tokens, later ones included.
Simulated here, as in SageAttention. The released code has kernels for 8-bit queries and keys only (`largest=127`).
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

WARP = 32  # queries that one warp takes
LARGEST = 448.0  # of the 8-bit floats with 4 bits of exponent and 3 of mantissa


def smooth_queries(q: Queries, size: int = QUERIES) -> tuple[Queries, Queries]:
    """Queries less the mean of their block of `size`, and that mean for each query (section 3.2). Two (B, T, H, K)."""
    pieces = q.split(size, 1)
    mean = torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in pieces], 1)
    return q - mean, mean


def query_threads(length: int) -> Tensor:
    """(length,), which queries share a step: of a warp's 32, those with the same remainder by 8 (section 3.3)."""
    token = torch.arange(length)
    return token // WARP * 8 + token % 8


def key_threads(length: int) -> Tensor:
    """(length,), which keys share a step: of a block of 64, those whose remainder by 8 is the same pair."""
    token = torch.arange(length)
    return token // KEYS * 4 + token % 8 // 2


def scores_in_4_bits(q: Queries, k: Keys, rules: Rules, *, largest: int = 7) -> Scores:
    """q k' / sqrt(K), both smoothed and in whole numbers up to `largest`, plus what the mean queries say (Eq. 4)."""
    queries, keys, mean, smoothed = in_4_bits(q, k, largest)
    scores = product(queries, keys) + _said(mean, smoothed)
    return scores if rules.is_additive else scores + said_to(q, smooth(k)[1]) / math.sqrt(q.shape[-1])


def in_4_bits(q: Queries, k: Keys, largest: int = 7) -> tuple[Quantized, Quantized, Queries, Keys]:
    """Smoothed queries over sqrt(K) and smoothed keys in whole numbers; then the mean that each query lost, and the
    smoothed keys as they are: what these two say to each other is added without rounding."""
    queries, mean = smooth_queries(q / math.sqrt(q.shape[-1]))
    keys, _ = smooth(k)
    groups = query_threads(q.shape[1]), key_threads(k.shape[1])
    return quantize(queries, groups[0], largest), quantize(keys, groups[1], largest), mean, keys


def in_8_bit_floats(v: Values, heads: int) -> Callable[[Tensor, slice], Heads]:
    """Weights and values in 8-bit floats, a fixed scale for weights and one a channel for values; summed in 22 bits.

    A block of keys is summed so; `gather` then adds the blocks in 32 (section 3.4).
    """
    small, scale = (x.float().repeat_interleave(heads // v.shape[2], 2) for x in small_values(v))

    def values(weights: Tensor, columns: slice) -> Heads:
        pieces = zip(_rounded(weights * LARGEST).split(32, -1), small[:, columns].split(32, 1))
        sums = torch.zeros(())
        for p, some in pieces:
            sums = in_22_bits(sums + torch.einsum("bhts,bshk->bthk", p, some))
        return sums.to(weights.dtype) * scale / LARGEST

    return values


def small_values(v: Values) -> tuple[Tensor, Tensor]:
    """Values (B, S, G, K) in 8-bit floats, and the scale (B, 1, G, K) of each channel."""
    peak = v.abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(len(v), 1, *v.shape[2:])
    scale = (peak / LARGEST).masked_fill(peak == 0, 1.0)
    return (v / scale).to(torch.float8_e4m3fn), scale


def in_22_bits(x: Tensor) -> Tensor:
    """Float32 with 13 bits of mantissa, the rest cut off: how the matrix unit holds sums of 8-bit floats."""
    return (x.float().view(torch.int32) & ~0x3FF).view(torch.float32)


def smoothed_values(v: Values, heads: int, scores: Scores, kernel: Callable[[Values], Heads]) -> Heads:
    """kernel(v - v-bar) + v-bar, for values that all tokens share a part of: weights sum to one (appendix).

    A query that sees nothing still gets zeros. kernel(values) is the attention of `scores` to values (B, S, G, K).
    """
    smoothed, mean = smooth(v)
    sees = ~scores.isneginf().all(-1).transpose(1, 2)[..., None]
    return kernel(smoothed) + mean.repeat_interleave(heads // v.shape[2], 2) * sees


def sage_attention_2(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, largest: int = 7) -> Heads:
    """`attend` with 4-bit scores (`largest=127` for 8 bits) and values in 8-bit floats, both sides smoothed.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Raises UserError when a
    gradient is asked for.
    """

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        scores = rules(scores_in_4_bits(q, k, rules, largest=largest))
        return gather(scores, in_8_bit_floats(v, q.shape[2]))

    return for_inference(compute, q, k, v, rules or Rules())


sage_attention_2.looks_ahead = "queries and keys of a block share means and scales, later positions included"


def _said(q: Queries, k: Keys) -> Scores:
    return torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


@paper(on=sage, arxiv="2411.10958", year=2024, trains=False)
def sage_2(recipe: Part, *, largest: int = 7) -> Part:
    return recipe.fill("kernel", sage_attention_2, largest=largest)
