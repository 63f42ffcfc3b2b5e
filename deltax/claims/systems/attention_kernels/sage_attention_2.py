"""Claims of sage-attention-2: the paper's equations, parity with peers, and what it measures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deltax import claim, part
from deltax.claims.systems.attention_kernels.sage_attention import drawn, similarity, with_outliers
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.sage_attention import (
    KEYS,
    QUERIES,
    blocks,
    gather,
    product,
    quantize,
    said_to,
    smooth,
)
from deltax.papers.systems.attention_kernels.sage_attention_2 import (
    LARGEST,
    WARP,
    _rounded,
    _said,
    in_4_bits,
    in_8_bit_floats,
    in_22_bits,
    key_threads,
    query_threads,
    sage_2,
    scores_in_4_bits,
    smooth_queries,
)
from deltax.parts.attention.scores import Rules, causal, window
from deltax.shapes import Heads, Keys, Queries, Scores, Values


@claim
def what_smoothing_takes_off_comes_back():
    """Smoothed scores plus the mean queries' scores equal the scores, and smoothed values' output plus the mean the
    output. Outputs and gradients agree to 1e-12, also for fully masked queries.
    """
    segments = (torch.arange(150) // 50).expand(2, -1)
    rules = Rules(mask=part(window, width=40), q_segments=segments, k_segments=segments[:, :100])
    q, k, v = drawn(150, 100)
    weight = torch.randn_like(q)
    smoothed, mean = smooth_queries(q)
    torch.testing.assert_close(_said(smoothed, k) + _said(mean, k), _said(q, k), rtol=1e-12, atol=1e-12)
    (keys, mean_key), found = smooth(k), []
    for kernel in (
        lambda: attend(q, k, v, rules),
        lambda: smoothed_values(v, 6, rules(_said(q, k)), lambda values: attend(q, k, values, rules)),
        lambda: _weighed(rules((_said(smoothed, keys) + _said(mean, keys) + said_to(q, mean_key)) / math.sqrt(5)), v),
    ):
        out = kernel()
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    assert not found[0][0][:, 140:].any()
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@claim
def a_thread_needs_one_step_of_each():
    """In each 16 x 8 tile, all scores of one thread belong to one group of queries and one group of keys.
    There are 32 groups for 128 queries, and 4 for 64 keys.
    """
    queries, keys = query_threads(QUERIES), key_threads(KEYS)
    assert len(queries.unique()) == 32 and len(keys.unique()) == 4
    for warp in range(QUERIES // WARP):
        for thread in range(32):
            rows = [warp * WARP + tile * 16 + thread // 4 + half for tile in range(2) for half in (0, 8)]
            columns = [tile * 8 + thread % 4 * 2 + second for tile in range(8) for second in (0, 1)]
            assert len(queries[rows].unique()) == 1 and len(keys[columns].unique()) == 1


@claim
def no_score_is_further_off_than_half_a_step_allows():
    """With INT4, scores are off by at most (|q|_1 step_k + |k|_1 step_q) / 2 + K step_q step_k / 4, q and k
    smoothed.
    """
    q, k, _ = (x.detach() for x in drawn(150, 100))
    (queries, _), (keys, mean_key) = smooth_queries(q / math.sqrt(5)), smooth(k)
    a, b, *_ = in_4_bits(q, k)
    assert a.whole.abs().max() == b.whole.abs().max() == 7
    one_norm = lambda x: x.abs().sum(-1, keepdim=True)
    step = b.step.repeat_interleave(3, 2)
    rows, columns = (lambda x: x.permute(0, 2, 1, 3)), (lambda x: x.permute(0, 2, 3, 1))
    bound = rows(one_norm(queries)) * columns(step) + columns(one_norm(keys.repeat_interleave(3, 2))) * rows(a.step)
    bound = bound / 2 + 5 * rows(a.step) * columns(step) / 4
    off = scores_in_4_bits(q, k, Rules(mask=part(causal))) + (said_to(q, mean_key) - _said(q, k)) / math.sqrt(5)
    assert (off.abs() <= bound + 1e-12).all() and off.abs().max() > 0.1 * bound.max()


@claim
def sums_in_two_levels_lose_less():
    """Over 8192 keys, sums in two levels (22 bits in blocks of 64, 32 bits between) have less than a tenth of the error
    of sums in 22 bits.
    """
    torch.manual_seed(0)
    weights, values = torch.rand(1, 2, 9, 8192), torch.rand(1, 8192, 2, 5)
    weights, values = _rounded(weights * LARGEST), _rounded(values * LARGEST)
    exact = torch.einsum("bhts,bshk->bthk", weights.double(), values.double())
    pieces = list(zip(weights.split(32, -1), values.split(32, 1)))
    products = [torch.einsum("bhts,bshk->bthk", p, some) for p, some in pieces]
    once = torch.zeros(())
    for some in products:
        once = in_22_bits(once + some)
    twice = sum(in_22_bits(in_22_bits(a) + b) for a, b in zip(products[::2], products[1::2]))
    assert (once - exact).abs().mean() > 10 * (twice - exact).abs().mean() > 0


@claim
def a_part_that_all_queries_share_changes_no_bit():
    """Adding one vector to all queries changes none of the quantised integers; adding noise to each query does."""
    q = torch.round(drawn(128, 64)[0].detach() * 1024) / 1024
    offset = torch.round(100 * torch.randn(2, 1, 6, 5, dtype=torch.float64) * 1024) / 1024
    whole = lambda q: quantize(smooth_queries(q)[0], query_threads(128), 7).whole
    assert torch.equal(whole(q + offset), whole(q)) and not torch.equal(whole(q + torch.randn_like(q)), whole(q))


@claim.measured(
    paper="cosine similarity with 4 bits rises with each smoothing, and a step a thread is near one a token (ablations)"
)
def four_bits_need_both_smoothings_and_fine_groups(lab):
    """With outliers in 6 of 64 channels, smoothing keys, then also queries, raises INT4's cosine similarity to exact
    attention by 0.001 each. With both, a scale a thread is better than a scale a block, and at most half as far from a
    scale a token.
    """
    found: dict[str, list[float]] = {}
    for seed in lab.seeds(8):
        for name, value in _variants(*with_outliers(seed, of_queries=10.0)).items():
            found.setdefault(name, []).append(value)
    margins = []
    for i in range(8):
        nothing, keys, both, block, token = (values[i] for values in found.values())
        rises = [keys - nothing - 0.001, both - keys - 0.001, both - block]
        margins.append(min(*rises, (token - block) / 2 - (token - both)))
    return lab.at_least(margins, 0.0, unit="of cosine similarity, the smallest margin", numbers=found)


@claim.measured(paper="text, image and video metrics hardly change with 4-bit queries and keys (end-to-end tables)")
def a_trained_model_hardly_notices(lab):
    """In a gpt trained for 100 steps with exact attention, sage_attention_2 costs at most 0.01 bits/byte held out (3
    seeds).
    """
    rises, recipe = [], lab.recipe("gpt")
    for seed in lab.seeds(3):
        run = lab.train(recipe, seed=seed, steps=100)
        model = sage_2(recipe)().build(run.task.facts).eval()
        model.load_state_dict(run.model.state_dict())
        rises.append(run.task.evaluate(model, recipe["objective"]).score - run.score)
    return lab.at_most(rises, 0.01, unit="bits per byte")


def _variants(q: Queries, k: Keys, v: Values) -> dict[str, float]:
    """Cosine similarity of INT4 attention to exact attention, with more and more of the paper's steps."""
    exact, root = attend(q, k, v), math.sqrt(q.shape[-1])
    length, keys = q.shape[1], smooth(k)[0]
    smoothed, mean = smooth_queries(q / root)
    threads = query_threads(length), key_threads(length)

    def near(q: Queries, k: Keys, groups: tuple[Tensor, Tensor], more: Scores | float = 0.0) -> float:
        scores = product(quantize(q, groups[0], 7), quantize(k, groups[1], 7)) + more
        return similarity(gather(scores, in_8_bit_floats(v, q.shape[2])), exact)

    added = _said(mean, keys)
    return {
        "nothing smoothed": near(q / root, k, threads),
        "keys smoothed": near(q / root, keys, threads),
        "keys and queries smoothed": near(smoothed, keys, threads, added),
        "both, a step a block": near(smoothed, keys, (blocks(length, QUERIES), blocks(length, KEYS)), added),
        "both, a step a token": near(smoothed, keys, (blocks(length, 1), blocks(length, 1)), added),
    }


def smoothed_values(v: Values, heads: int, scores: Scores, kernel: Callable[[Values], Heads]) -> Heads:
    """kernel(V - v-mean) + v-mean, exact because weights sum to one (appendix).

    kernel(values) is the attention of `scores` to values (B, S, G, K). A fully masked query still gets zeros.
    """
    smoothed, mean = smooth(v)
    sees = ~scores.isneginf().all(-1).transpose(1, 2)[..., None]
    return kernel(smoothed) + mean.repeat_interleave(heads // v.shape[2], 2) * sees


def _weighed(scores: Scores, v: Values) -> Heads:
    blind = scores.isneginf().all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("bhts,bshk->bthk", weights, v.repeat_interleave(weights.shape[1] // v.shape[2], 2))
