"""Claims of sage-attention: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from torch import Tensor

from deltax import claim, part
from deltax.errors import UserError
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.sage_attention import (
    KEYS,
    QUERIES,
    blocks,
    gather,
    in_half,
    product,
    quantize,
    sage,
    sage_attention,
    said_to,
    smooth,
)
from deltax.parts.attention.scores import Rules, causal, everywhere, window
from deltax.shapes import Keys, Queries, Scores, Values


@claim
def the_mean_key_is_not_seen():
    """With smoothed keys, output and gradients equal attention's to 1e-12 under three masks; row log-sums shift by q .
    k-mean.
    """
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
    """Adding one vector to all keys changes no bit of sage_attention's output; adding noise to each key does."""
    q, k, v = drawn(61, 64)
    k, offset = (torch.round(x.detach() * 1024) / 1024 for x in (k, 100 * torch.randn(2, 1, 2, 5, dtype=torch.float64)))
    assert torch.equal(sage_attention(q, k + offset, v), sage_attention(q, k, v))
    assert not torch.equal(sage_attention(q, k + torch.randn_like(k), v), sage_attention(q, k, v))


@claim
def no_score_is_further_off_than_half_a_step_allows():
    """Scores are off by at most (|q|_1 step_k + |k|_1 step_q) / 2 + K step_q step_k / 4, with 1 and 64 tokens a step.
    Outputs are off by at most (e^2E - 1) max |v|, with E the row's largest bound; one token a step has the lower
    bounds.
    """
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
    """With a soft cap of 2, the output is within 1 % of exact attention's; with q (k - k-mean)' it would be over 10 %
    off.
    """
    q, k, v = (x.detach() for x in drawn(61, 61))
    rules = Rules(lambda s, b, h, i, j: 2 * torch.tanh(s / 2), part(causal))
    k = k + 5
    exact = attend(q, k, v, rules)
    assert (sage_attention(q, k, v, rules) - exact).norm() < 0.01 * exact.norm()
    assert (attend(q, smooth(k)[0], v, rules) - exact).norm() > 0.1 * exact.norm()


@claim
def gradients_are_refused():
    """A backward pass through sage_attention raises UserError; rounding would give zero gradients."""
    q, k, v = drawn(5, 5)
    try:
        sage_attention(q, k, v).sum().backward()
    except UserError as error:
        assert "no gradient" in str(error)
    else:
        raise AssertionError("a gradient came back")


@claim.parity(peer="torch._int_mm (int8 x int8 in int32)")
def equals_integer_matrix_units():
    """All simulated INT8 sums of 61 x 150 scores equal torch._int_mm's."""
    q, k, _ = (x.detach().float() for x in drawn(61, 150))
    a, b = quantize(q, blocks(61, 64)), quantize(k, blocks(150, 64))
    ours = product(a._replace(step=torch.ones_like(a.step)), b._replace(step=torch.ones_like(b.step)))
    for head in range(6):
        left, right = a.whole[0, :, head].to(torch.int8), b.whole[0, :, head // 3].to(torch.int8)
        theirs = torch._int_mm(left, right.T.contiguous())
        assert torch.equal(ours[0, head].to(torch.int32), theirs)


@claim.measured(paper="with channel outliers in K, 8 bits fail without smoothing (section 4.2 and its ablation table)")
def keys_with_outliers_need_smoothing(lab):
    """With an offset of 10 in 6 of 64 key channels, INT8 attention's cosine similarity to exact attention is above
    0.999 with smoothed keys, and below without.
    """
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
    """In a gpt trained for 100 steps with exact attention, sage_attention costs at most 0.005 bits/byte held out (3
    seeds).
    """
    rises, recipe = [], lab.recipe("gpt")
    for seed in lab.seeds(3):
        run = lab.train(recipe, seed=seed, steps=100)
        model = sage(recipe)().build(run.task.facts).eval()
        model.load_state_dict(run.model.state_dict())
        rises.append(run.task.evaluate(model, recipe["objective"]).score - run.score)
    return lab.at_most(rises, 0.005, unit="bits per byte")


def drawn(queries: int, keys: int) -> list[Tensor]:
    """Queries with six heads, keys and values with two, width 5, in float64."""
    torch.manual_seed(0)
    sizes = ((queries, 6), (keys, 2), (keys, 2))
    return [torch.randn(2, time, heads, 5, dtype=torch.float64, requires_grad=True) for time, heads in sizes]


def with_outliers(seed: int, *, of_queries: float = 0.0) -> tuple[Queries, Keys, Values]:
    """512 tokens, two heads of width 64; in six channels all keys share an offset of 10, all queries of_queries."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 512, 2, 64, generator=source) for _ in range(3))
    for x, offset in ((k, 10.0), (q, of_queries)):
        signs = torch.randint(2, (2, 6), generator=source) * 2.0 - 1
        for head in range(2):
            x[..., head, torch.randperm(64, generator=source)[:6]] += offset * signs[head]
    return q, k, v


def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors, the paper's measure of accuracy."""
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def _bound(q: Queries, q_step: Tensor, k: Keys, k_step: Tensor) -> Scores:
    k, k_step = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, k_step))
    rows = lambda x: x.permute(0, 2, 1, 3)
    columns = lambda x: x.permute(0, 2, 3, 1)
    one_norm = lambda x: x.abs().sum(-1, keepdim=True)
    steps = rows(q_step) * columns(k_step)
    return (rows(one_norm(q)) * columns(k_step) + columns(one_norm(k)) * rows(q_step)) / 2 + q.shape[-1] * steps / 4
