"""SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration.
Zhang, Wei, Huang, Zhang, Zhu, Chen, 2024. arXiv:2410.02367

FlashAttention-2, but queries and keys meet as 8-bit integers, once the mean key, which softmax cannot see, is off.

Eight bits hold a row well unless a few channels are far larger than the rest, and in keys they are: all tokens share a
large offset there. A mean subtracted from every key moves all scores of a row alike, so it costs nothing to remove.
Weights and values meet in half precision, summed in half precision. Integers are simulated here, each held exactly in a
float; what a matrix unit computes is the same to the bit. For inference: rounding has no derivative. A scale is that of
a whole block and the mean key that of all keys, so under a causal mask a score depends on later tokens by up to a
rounding step: wherever such a model is scored, a note says so.

The released code rounds halves away from zero, and so does this; it scales queries by log2(e) before it rounds them,
which changes no integer, and so does not this.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.errors import UserError
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_2
from deltax.papers.systems.attention_kernels.online_softmax import relative
from deltax.parts.attention.scores import Rules
from deltax.shapes import Heads, Keys, Queries, Scores, Values

QUERIES, KEYS = 128, 64  # that share a scale, and that a program takes at once


class Quantized(NamedTuple):
    """Whole numbers (B, T, H, K), held in floats, and the step (B, T, H, 1) that each counts."""

    whole: Tensor
    step: Tensor


def smooth(x: Keys) -> tuple[Keys, Tensor]:
    """Without its mean over tokens, and that mean (B, 1, G, K) (section 4.2)."""
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def blocks(length: int, size: int) -> Tensor:
    """(length,), the number of the block of `size` tokens that each token is in; size 1 is a step a token.

    Raises UserError for a size below 1.
    """
    if size < 1:
        raise UserError(f"a block of tokens shares one step: give at least 1 token, not {size}")
    return torch.arange(length) // size


def quantize(x: Tensor, group: Tensor, largest: int = 127) -> Quantized:
    """Each token in whole steps, from -largest to largest; tokens of one group (T,) and head share the step (Eq. 3)."""
    group, each = group.to(x.device), x.abs().amax(-1)
    peak = x.new_zeros(x.shape[0], int(group.max()) + 1 if len(group) else 0, x.shape[2])
    peak = peak.scatter_reduce(1, group[:, None].expand_as(each), each, "amax")
    step = (peak / largest).masked_fill(peak == 0, 1.0)[:, group, :, None]
    return Quantized(torch.copysign(torch.floor(x.abs() / step + 0.5), x), step)


def product(q: Quantized, k: Quantized) -> Scores:
    """What queries (B, T, H, K) say to keys (B, S, G, K), integers multiplied, then both steps. -> (B, H, T, S).

    A sum of 127 x 127 x K is exact in float32 up to K = 1040.
    """
    whole, step = (x.repeat_interleave(q.whole.shape[2] // x.shape[2], 2) for x in k)
    sums = torch.einsum("bthk,bshk->bhts", q.whole, whole)
    return sums * q.step.permute(0, 2, 1, 3) * step.permute(0, 2, 3, 1)


def scores_in_8_bits(q: Queries, k: Keys, rules: Rules, *, queries: int = QUERIES, keys: int = KEYS) -> Scores:
    """q k' / sqrt(K) through 8-bit integers, the keys smoothed; `queries` and `keys` share a step. -> (B, H, T, S).

    Where the score is more than a bias it must be the score itself: what the mean key takes off is added again.
    """
    scores = product(*in_8_bits(q, k, queries, keys))
    return scores if rules.is_additive else scores + said_to(q, smooth(k)[1]) / math.sqrt(q.shape[-1])


def in_8_bits(q: Queries, k: Keys, queries: int = QUERIES, keys: int = KEYS) -> tuple[Quantized, Quantized]:
    """Queries over sqrt(K), and smoothed keys, in whole numbers."""
    group = blocks(q.shape[1], queries), blocks(k.shape[1], keys)
    return quantize(q / math.sqrt(q.shape[-1]), group[0]), quantize(smooth(k)[0], group[1])


def said_to(q: Queries, one: Tensor) -> Tensor:
    """What each query says to one key (B, 1, G, K) of its group. -> (B, H, T, 1)."""
    return torch.einsum("bthk,bshk->bhts", q, one.repeat_interleave(q.shape[2] // one.shape[2], 2))


def gather(scores: Scores, values: Callable[[Tensor, slice], Heads], keys: int = KEYS) -> Heads:
    """softmax(scores) times values, `keys` of them at a time, as FlashAttention-2 does it: divided once, at the end.

    values(weights, columns) is what weights (B, H, T, columns) in [0, 1] gather, (B, T, H, K) in float32.
    """
    largest = scores.new_full(scores.shape[:3], -torch.inf)
    total, out = torch.zeros_like(largest), values(scores[..., :0], slice(0, 0))
    over_heads = lambda x: x.transpose(1, 2)[..., None]
    for start in range(0, scores.shape[-1], keys):
        columns = slice(start, min(start + keys, scores.shape[-1]))
        new = torch.maximum(largest, scores[..., columns].amax(-1))
        weights, rescale = relative(scores[..., columns], new[..., None]), relative(largest, new)
        total = total * rescale + weights.sum(-1)
        out = out * over_heads(rescale) + values(weights, columns)
        largest = new
    return out / over_heads(total.masked_fill(total == 0, 1.0))


def in_half(v: Values, heads: int) -> Callable[[Tensor, slice], Heads]:
    """Weights and values in float16, and the sums too, every 16 products, as the matrix unit has them (section 4.4)."""
    half = v.half().float().repeat_interleave(heads // v.shape[2], 2)

    def values(weights: Tensor, columns: slice) -> Heads:
        sums = torch.zeros((), dtype=torch.float16, device=v.device)
        pieces = zip(weights.half().float().split(16, -1), half[:, columns].split(16, 1))
        for p, some in pieces:
            sums = (sums.float() + torch.einsum("bhts,bshk->bthk", p, some)).half()
        return sums.to(weights.dtype)

    return values


def sage_attention(
    q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, queries: int = QUERIES, keys: int = KEYS
) -> Heads:
    """`attend` with 8-bit scores and half-precision values. `queries` and `keys` are how many tokens share a step.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Raises UserError when a
    gradient is asked for, or for fewer than 1 token a step.
    """

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        scores = rules(scores_in_8_bits(q, k, rules, queries=queries, keys=keys))
        return gather(scores, in_half(v, q.shape[2]))

    return for_inference(compute, q, k, v, rules or Rules())


sage_attention.looks_ahead = "a block of queries and one of keys have one scale each, later positions included"


def for_inference(compute: Callable[..., Heads], q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
    """compute(q, k, v, rules) in float32 at least, in the type of q; a gradient through it is refused."""
    return _Inference.apply(q, k, v, rules, compute)


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules, compute: Callable[..., Heads]) -> Tensor:
        wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        return compute(*wide, rules).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        raise UserError("attention in whole numbers has no gradient: train with another kernel, and put this in after")


@paper(on=flash_2, arxiv="2410.02367", year=2024, trains=False)
def sage(recipe: Part) -> Part:
    return recipe.fill("kernel", sage_attention)
