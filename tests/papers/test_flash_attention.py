"""What the claims of online_softmax and flash_attention leave open: precision, decoding, skipped tiles, bad input."""

import pytest
import torch

from deltax import UserError, kernels, part
from deltax.lab.measure import flops_per_step
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.attention_kernels.flash_attention import flash, flash_attention, fold
from deltax.papers.systems.attention_kernels.online_softmax import softmax
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.scores import Rules, causal, window


def test_allowed_is_where_scores_stay_finite():
    q, k = torch.randn(2, 13, 4, 5), torch.randn(2, 9, 2, 5)
    segments = torch.randint(3, (2, 13))
    rules = Rules(mask=part(window, width=5), q_segments=segments, k_segments=segments[:, :9])
    scores = rules(torch.zeros(2, 4, 13, 9))
    rows, columns = slice(4, 11), slice(3, 9)
    assert torch.equal(rules.allowed(q, k).expand(2, 4, 13, 9), scores.isfinite())
    tile = rules.allowed(q, k, rows, columns).expand(2, 4, 7, 6)
    assert torch.equal(tile, scores[..., rows, columns].isfinite())


def test_low_precision_follows_autocast_and_its_gradients_do_too():
    torch.manual_seed(0)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 61, 4, 16))
    rules, weight = Rules(mask=part(causal)), torch.randn(2, 61, 4, 16)
    exact = attend(q, k, v, rules)
    expected = torch.autograd.grad((exact * weight).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q, k, v, rules, tile=16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    for a, b in zip(torch.autograd.grad((out.float() * weight).sum(), (q, k, v)), expected, strict=True):
        assert (a - b).norm() / b.norm() < 0.02


def test_a_gpt_with_it_is_gpt_and_decodes_step_by_step():
    torch.manual_seed(0)
    recipe = gpt + flash(tile=4)
    plain, tiled = (r().build({"vocab": 11, "context": 9}).double() for r in (gpt, recipe))
    tiled.load_state_dict(plain.state_dict())
    tokens, ctx = torch.randint(11, (2, 9)), Context(state=DecodingState())
    torch.testing.assert_close(tiled(tokens), plain(tokens), rtol=1e-12, atol=1e-12)
    steps = [tiled(piece, ctx) for piece in tokens.split([4, 1, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), plain(tokens), rtol=1e-12, atol=1e-12)


def test_flops_are_counted_on_the_reference():
    assert kernels.reference(gpt + flash(tile=16)) == gpt
    assert kernels.reference(gpt) == gpt
    small = gpt.put("loop.batch", 1)
    assert flops_per_step(small + flash(tile=16)) == flops_per_step(small)


def test_memory_beyond_the_tiles_is_never_read():
    """Keys that no query may look at can hold anything: their tiles are not loaded."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, 2, 4)
    k[:, 4:], v[:, 4:] = torch.nan, torch.nan
    rules, done = Rules(mask=part(causal)), {}
    fold(q[:, :4], k, v, rules, done, (2, 2))
    assert all(t.out.isfinite().all() for t in done.values())


def test_second_derivatives_are_refused():
    q = torch.randn(1, 5, 1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(flash_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda: gpt + flash(tile=0),
        lambda: flash_attention(*torch.randn(3, 1, 2, 1, 2), tile=-1),
        lambda: softmax(torch.randn(3), block=0),
    ],
)
def test_a_block_below_one_is_refused(call):
    with pytest.raises(UserError, match="at least 1"):
        call()
