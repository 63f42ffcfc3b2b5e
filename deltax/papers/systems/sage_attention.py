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

from deltax import Part, claim, paper, part
from deltax.errors import UserError
from deltax.papers.language.softmax_attention import attend
from deltax.papers.systems.flash_attention_2 import flash_2
from deltax.papers.systems.online_softmax import relative
from deltax.parts.scores import Rules, causal, everywhere, window
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


@claim
def the_mean_key_is_not_seen():
    """Smoothed keys leave attention as it is, gradients too; of the logarithm of a row's sum they take q k-bar off."""
    for mask, keys in ((part(causal), 61), (part(everywhere), 37), (part(window, width=9), 61)):
        q, k, v = drawn(61, keys)
        weight, rules = torch.randn_like(q), Rules(mask=mask)
        found = []
        for seen in (k, smooth(k)[0]):
            out = attend(q, seen, v, rules)
            found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
        for plain, smoothed in zip(*found, strict=True):
            torch.testing.assert_close(smoothed, plain, rtol=1e-12, atol=1e-12)
    smoothed, mean = smooth(k)
    said = lambda keys: torch.einsum("bthk,bshk->bhts", q, keys.repeat_interleave(3, 2))
    exact, shifted = (said(x).logsumexp(-1) for x in (k, smoothed))
    torch.testing.assert_close(shifted + said_to(q, mean)[..., 0], exact, rtol=1e-12, atol=1e-12)


@claim
def an_offset_of_all_keys_changes_no_bit():
    """Any vector added to every key leaves the output of sage_attention as it was, to the bit."""
    q, k, v = drawn(61, 64)
    k, offset = (torch.round(x.detach() * 1024) / 1024 for x in (k, 100 * torch.randn(2, 1, 2, 5, dtype=torch.float64)))
    assert torch.equal(sage_attention(q, k + offset, v), sage_attention(q, k, v))
    assert not torch.equal(sage_attention(q, k + torch.randn_like(k), v), sage_attention(q, k, v))


@claim
def no_score_is_further_off_than_half_a_step_allows():
    """Scores are off by (|q|_1 step_k + |k|_1 step_q) / 2 + K step_q step_k / 4 at most, and outputs by
    (e^2E - 1) max |v|, E the largest such error of the row; one step a token never allows more than one a block."""
    q, k, v = (x.detach() for x in drawn(61, 150))
    q = 3 * q
    exact, wanted = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(3, 2)) / math.sqrt(5), attend(q, k, v)
    smoothed, mean = smooth(k)
    bounds = []
    for size in (1, 64):
        a, b = quantize(q / math.sqrt(5), blocks(61, size)), quantize(smoothed, blocks(150, size))
        assert a.whole.abs().max() == b.whole.abs().max() == 127
        off = (product(a, b) + said_to(q / math.sqrt(5), mean) - exact).abs()
        bounds.append(_bound(q / math.sqrt(5), a.step, smoothed, b.step))
        assert (off <= bounds[-1] + 1e-12).all() and off.max() > 0.05 * bounds[-1].max()
        plain = lambda p, columns: torch.einsum("bhts,bshk->bthk", p, v.repeat_interleave(3, 2)[:, columns])
        error = (gather(product(a, b), plain) - wanted).abs().amax(-1)
        worst = bounds[-1].amax(-1).transpose(1, 2)
        assert (error <= torch.expm1(2 * worst) * v.abs().max()).all() and error.any()
    assert (bounds[0] <= bounds[1] + 1e-12).all()


@claim
def scores_that_are_no_bias_are_given_whole():
    """A score that bends, such as a soft cap, sees q k' and not q (k - k-bar)': the output is within 1 % of exact."""
    q, k, v = (x.detach() for x in drawn(61, 61))
    rules = Rules(lambda s, b, h, i, j: 2 * torch.tanh(s / 2), part(causal))
    k = k + 5
    exact = attend(q, k, v, rules)
    assert (sage_attention(q, k, v, rules) - exact).norm() < 0.01 * exact.norm()
    assert (attend(q, smooth(k)[0], v, rules) - exact).norm() > 0.1 * exact.norm()


@claim
def gradients_are_refused():
    """A gradient through rounded scores, which would be zero for queries and keys, is an error, not a zero."""
    q, k, v = drawn(5, 5)
    try:
        sage_attention(q, k, v).sum().backward()
    except UserError as error:
        assert "no gradient" in str(error)
    else:
        raise AssertionError("a gradient came back")


@claim.parity(peer="torch._int_mm (int8 x int8 in int32)")
def equals_integer_matrix_units():
    """The sums that are simulated in floats are those of torch's own 8-bit integer product, every one."""
    q, k, _ = (x.detach().float() for x in drawn(61, 150))
    a, b = quantize(q, blocks(61, 64)), quantize(k, blocks(150, 64))
    ours = product(a._replace(step=torch.ones_like(a.step)), b._replace(step=torch.ones_like(b.step)))
    for head in range(6):
        left, right = a.whole[0, :, head].to(torch.int8), b.whole[0, :, head // 3].to(torch.int8)
        theirs = torch._int_mm(left, right.T.contiguous())
        assert torch.equal(ours[0, head].to(torch.int32), theirs)


@claim.measured(paper="with channel outliers in K, 8 bits fail without smoothing (section 4.2 and its ablation table)")
def keys_with_outliers_need_smoothing(lab):
    """Where a tenth of the key channels share an offset of ten standard deviations, 8-bit attention has a cosine
    similarity to exact attention above 0.999 with smoothed keys, and below without."""
    margins, found = [], {"smoothed": [], "as they are": []}
    for seed in lab.seeds(8):
        q, k, v = with_outliers(seed)
        exact = attend(q, k, v)
        for name, keys in (("smoothed", smooth(k)[0]), ("as they are", k)):
            scores = product(quantize(q / math.sqrt(64), blocks(512, QUERIES)), quantize(keys, blocks(512, KEYS)))
            found[name].append(similarity(gather(scores, in_half(v, 2)), exact))
        margins.append(min(found["smoothed"][-1] - 0.999, 0.999 - found["as they are"][-1]))
    return lab.at_least(margins, 0.0, unit="of cosine similarity, the smaller margin", numbers=found)


@claim.measured(paper="Llama2's perplexity on WikiText, and image, video and text metrics, hardly change (section 5)")
def a_trained_model_hardly_notices(lab):
    """Put into a gpt that was trained with exact attention, it costs at most 0.005 bits per byte held out."""
    rises, recipe = [], lab.recipe("gpt")
    for seed in lab.seeds(3):
        run = lab.train(recipe, seed=seed, steps=100)
        model = sage(recipe)().build(run.task.facts).eval()
        model.load_state_dict(run.model.state_dict())
        rises.append(run.task.evaluate(model, recipe["objective"]).score - run.score)
    return lab.at_most(rises, 0.005, unit="bits per byte")


def drawn(queries: int, keys: int) -> list[Tensor]:
    """Six query heads on two key heads, of width 5, in float64."""
    torch.manual_seed(0)
    sizes = ((queries, 6), (keys, 2), (keys, 2))
    return [torch.randn(2, time, heads, 5, dtype=torch.float64, requires_grad=True) for time, heads in sizes]


def with_outliers(seed: int, *, of_queries: float = 0.0) -> tuple[Queries, Keys, Values]:
    """512 tokens, two heads of width 64, in six of whose channels all keys share an offset of 10, queries another."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 512, 2, 64, generator=source) for _ in range(3))
    for x, offset in ((k, 10.0), (q, of_queries)):
        signs = torch.randint(2, (2, 6), generator=source) * 2.0 - 1
        for head in range(2):
            x[..., head, torch.randperm(64, generator=source)[:6]] += offset * signs[head]
    return q, k, v


def similarity(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors taken as vectors, as the paper measures accuracy."""
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def _bound(q: Queries, q_step: Tensor, k: Keys, k_step: Tensor) -> Scores:
    k, k_step = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, k_step))
    rows = lambda x: x.permute(0, 2, 1, 3)
    columns = lambda x: x.permute(0, 2, 3, 1)
    one_norm = lambda x: x.abs().sum(-1, keepdim=True)
    steps = rows(q_step) * columns(k_step)
    return (rows(one_norm(q)) * columns(k_step) + columns(one_norm(k)) * rows(q_step)) / 2 + q.shape[-1] * steps / 4
