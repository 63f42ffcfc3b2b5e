"""SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration.
Zhang, Wei, Huang, Zhang, Zhu, Chen, 2024. arXiv:2410.02367

FlashAttention-2, but Q K' is in INT8 after subtracting the mean key, and P V is in FP16.

INT8 represents a row well unless a few channels are far larger than the rest. Keys have such channels, with an offset
that all tokens share. Subtracting the mean key shifts all scores of a row alike, which softmax ignores. P and V are
multiplied in float16 and summed in float16. INT8 is simulated here by floats that hold integers, with the same bits as
a matrix unit's. Rounding has no gradient: inference only. Scales cover whole blocks and the mean key all keys, so under
a causal mask a score depends on later tokens by up to a rounding step; a note says so wherever such a model is scored.

Halves are rounded away from zero, as in the released code. That code multiplies queries by log2(e) before rounding;
this changes no integer and is left out here.
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

QUERIES, KEYS = 128, 64  # tokens that share a scale; also the tile of the kernel


class Quantized(NamedTuple):
    """Integers (B, T, H, K), held in floats, and their step (B, T, H, 1)."""

    whole: Tensor
    step: Tensor


def sage_attention(
    q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, queries: int = QUERIES, keys: int = KEYS
) -> Heads:
    """`attend` with INT8 scores and float16 values. `queries` and `keys` are the tokens that share a step.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Raises UserError for a
    backward pass and for fewer than 1 token a step.
    """

    def compute(q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
        scores = rules(scores_in_8_bits(q, k, rules, queries=queries, keys=keys))
        return gather(scores, in_half(v, q.shape[2]))

    return for_inference(compute, q, k, v, rules or Rules())


sage_attention.looks_ahead = "a block of queries and a block of keys have one scale each, later positions included"


@paper(on=flash_2, arxiv="2410.02367", year=2024, trains=False)
def sage(recipe: Part) -> Part:
    return recipe.fill("kernel", sage_attention)


def scores_in_8_bits(q: Queries, k: Keys, rules: Rules, *, queries: int = QUERIES, keys: int = KEYS) -> Scores:
    """Q K' / sqrt(K) in INT8 with smoothed keys; `queries` and `keys` are tokens a step. -> (B, H, T, S).

    A score function that is more than an additive bias needs the true score: there q . k-mean is added again.
    """
    scores = product(*in_8_bits(q, k, queries, keys))
    return scores if rules.is_additive else scores + said_to(q, smooth(k)[1]) / math.sqrt(q.shape[-1])


def in_8_bits(q: Queries, k: Keys, queries: int = QUERIES, keys: int = KEYS) -> tuple[Quantized, Quantized]:
    """Queries / sqrt(K), and smoothed keys, in INT8."""
    group = blocks(q.shape[1], queries), blocks(k.shape[1], keys)
    return quantize(q / math.sqrt(q.shape[-1]), group[0]), quantize(smooth(k)[0], group[1])


def smooth(x: Keys) -> tuple[Keys, Tensor]:
    """Keys minus their mean over tokens, and that mean (B, 1, G, K) (section 4.2)."""
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def quantize(x: Tensor, group: Tensor, largest: int = 127) -> Quantized:
    """Integers from -largest to largest; the tokens of a group (T,) share one step a head (Eq. 3)."""
    group, each = group.to(x.device), x.abs().amax(-1)
    # the largest magnitude of each group and head, (B, groups, H)
    peak = x.new_zeros(x.shape[0], int(group.max()) + 1 if len(group) else 0, x.shape[2])
    peak = peak.scatter_reduce(1, group[:, None].expand_as(each), each, "amax")
    # Eq. 3: step = max |x| / 127; a group of zeros has step 1
    step = (peak / largest).masked_fill(peak == 0, 1.0)[:, group, :, None]
    # halves away from zero; torch.round would take them to even
    return Quantized(torch.copysign(torch.floor(x.abs() / step + 0.5), x), step)


def blocks(length: int, size: int) -> Tensor:
    """(length,), the index of each token's block of `size` tokens; size 1 gives each token its own step.

    Raises UserError for a size below 1.
    """
    if size < 1:
        raise UserError(f"a block must have at least 1 token, not {size}: choose 1 or more tokens a step")
    return torch.arange(length) // size


def product(q: Quantized, k: Quantized) -> Scores:
    """Scores of queries (B, T, H, K) and keys (B, S, G, K): an integer product, times both steps. -> (B, H, T, S).

    A sum of K products of 127 x 127 is exact in float32 up to K = 1040.
    """
    whole, step = (x.repeat_interleave(q.whole.shape[2] // x.shape[2], 2) for x in k)
    sums = torch.einsum("bthk,bshk->bhts", q.whole, whole)
    # S = (Q_i K_i') step_q step_k, (B, H, T, S)
    return sums * q.step.permute(0, 2, 1, 3) * step.permute(0, 2, 3, 1)


def said_to(q: Queries, one: Tensor) -> Tensor:
    """Dot products of queries with one key (B, 1, G, K) a head. -> (B, H, T, 1)."""
    return torch.einsum("bthk,bshk->bhts", q, one.repeat_interleave(q.shape[2] // one.shape[2], 2))


def gather(scores: Scores, values: Callable[[Tensor, slice], Heads], keys: int = KEYS) -> Heads:
    """softmax(scores) V by FlashAttention-2's online softmax, `keys` at a time: one division at the end.

    values(weights, columns) -> weights (B, H, T, columns) in [0, 1] times values, (B, T, H, K) in float32.
    """
    largest = scores.new_full(scores.shape[:3], -torch.inf)
    total, out = torch.zeros_like(largest), values(scores[..., :0], slice(0, 0))
    over_heads = lambda x: x.transpose(1, 2)[..., None]
    for start in range(0, scores.shape[-1], keys):
        columns = slice(start, min(start + keys, scores.shape[-1]))
        # online softmax: m, l and O are rescaled to the new maximum
        new = torch.maximum(largest, scores[..., columns].amax(-1))
        weights, rescale = relative(scores[..., columns], new[..., None]), relative(largest, new)
        total = total * rescale + weights.sum(-1)
        out = out * over_heads(rescale) + values(weights, columns)
        largest = new
    return out / over_heads(total.masked_fill(total == 0, 1.0))


def in_half(v: Values, heads: int) -> Callable[[Tensor, slice], Heads]:
    """P and V in float16, summed in float16 after every 16 products, as the matrix unit does (section 4.4)."""
    half = v.half().float().repeat_interleave(heads // v.shape[2], 2)

    def values(weights: Tensor, columns: slice) -> Heads:
        sums = torch.zeros((), dtype=torch.float16, device=v.device)
        pieces = zip(weights.half().float().split(16, -1), half[:, columns].split(16, 1))
        for p, some in pieces:
            # 16 products are summed exactly, then rounded to float16
            sums = (sums.float() + torch.einsum("bhts,bshk->bthk", p, some)).half()
        return sums.to(weights.dtype)

    return values


def for_inference(compute: Callable[..., Heads], q: Queries, k: Keys, v: Values, rules: Rules) -> Heads:
    """compute(q, k, v, rules) in float32 at least, returned in the dtype of q; backward raises UserError."""
    return _Inference.apply(q, k, v, rules, compute)


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules, compute: Callable[..., Heads]) -> Tensor:
        wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        return compute(*wide, rules).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        raise UserError("INT8 attention has no gradient: train with another kernel and use this one for inference")
