"""Attention over nothing: no queries give no rows, queries without keys give zeros, with gradients, in every kernel."""

import pytest
import torch

from deltax import UserError, part, recipe
from deltax.claims.checking import randomise
from deltax.kernels.attention import sdpa
from deltax.papers.language.attention.softmax_attention import CrossAttention, attend
from deltax.papers.systems.attention_kernels.flash_attention import flash_attention
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_attention_2
from deltax.papers.systems.attention_kernels.flashinfer import alone, flashinfer, plan, shared
from deltax.papers.systems.attention_kernels.flex_attention import flex_attention
from deltax.papers.systems.attention_kernels.memory_efficient_attention import memory_efficient_attention
from deltax.papers.systems.attention_kernels.ring_attention import ring_attention
from deltax.papers.systems.attention_kernels.sage_attention import sage_attention
from deltax.papers.systems.attention_kernels.sage_attention_2 import sage_attention_2
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.pages import Pages
from deltax.parts.attention.scores import Rules, causal, everywhere
from deltax.parts.model.language_model import LanguageModel
from deltax.parts.model.stack import Stack
from deltax.tasks.language.sequences import PADDING

TRAINED = (attend, sdpa, flash_attention, flash_attention_2, memory_efficient_attention, flex_attention, ring_attention)


@pytest.mark.parametrize("kernel", [*TRAINED, sage_attention, sage_attention_2], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("mask", [everywhere, causal])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_attention_over_nothing_is_nothing(kernel, mask, batch, queries, keys):
    trained = kernel in TRAINED
    q, k, v = (
        torch.randn(batch, time, heads, 8, requires_grad=trained)
        for time, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    out = kernel(q, k, v, Rules(mask=mask))
    assert out.shape == (batch, queries, 4, 8) and not out.any() and out.isfinite().all()
    if trained:
        out.sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape and not t.grad.any() for t in (q, k, v))


@pytest.mark.parametrize("chunks", [alone, shared])
@pytest.mark.parametrize(
    ("lengths", "asked"), [((0, 3), (0, 1)), ((3, 0, 2), (2, 0, 0)), ((0, 0), (0, 0)), ((2,), (0,))]
)
def test_a_request_that_has_written_nothing_has_no_rows(chunks, lengths, asked):
    cache = Pages(8, 2)
    for request, count in enumerate(lengths):
        cache.append(request, torch.randn(count, 2, 4), torch.randn(count, 2, 6))
    requests, q = list(range(len(lengths))), torch.randn(sum(asked), 4, 4)
    for work in (None, plan(chunks(cache, requests), 2), [chunks(cache, requests)]):
        out = flashinfer(q, asked, cache, requests, work)
        assert out.shape == (sum(asked), 4, 6) and out.isfinite().all()


def test_a_query_of_a_ragged_batch_that_sees_no_key_gets_zeros():
    cache = Pages(8, 2)
    cache.append(0, torch.randn(5, 2, 4), torch.randn(5, 2, 4))
    q = torch.randn(2, 4, 4, requires_grad=True)
    not_the_last = Rules(mask=lambda b, h, q, k: (q < 4) & (k < 9))
    out = flashinfer(q, [2], cache, [0], plan(alone(cache, [0]), 3), not_the_last)
    out.square().sum().backward()
    assert out[0].abs().min() > 0 and not out[1].any() and not q.grad[1].any() and q.grad.isfinite().all()


@pytest.mark.parametrize("field", ["q_at", "k_at"])
def test_rules_with_positions_have_no_place_in_a_ragged_batch(field):
    cache = Pages(8, 2)
    cache.append(0, torch.randn(5, 2, 4), torch.randn(5, 2, 4))
    with pytest.raises(UserError, match=f"{field} of rules have no place in a ragged batch"):
        flashinfer(torch.randn(2, 4, 4), [2], cache, [0], rules=Rules(mask=part(causal), **{field: torch.arange(5)}))
    both = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(UserError, match="q_segments of rules have no place"):
        flashinfer(torch.randn(2, 4, 4), [2], cache, [0], rules=Rules(q_segments=both, k_segments=both))


@pytest.mark.parametrize("title", ["gpt", "gpt+rope", "gpt+bpt", "gpt+ring-attention", "gpt+flash-attention-2"])
def test_no_tokens_give_no_logits_and_leave_a_state_as_it_was(title):
    model = randomise(recipe(title).set(LanguageModel, dim=12).set(Stack, depth=1)().build({"vocab": 11, "context": 9}))
    tokens, nothing = torch.randint(11, (2, 7)), torch.zeros(2, 0, dtype=torch.int64)
    assert model(nothing).shape == (2, 0, 11)
    ctx = Context(state=DecodingState())
    steps = [model(piece, ctx) for piece in (nothing, tokens[:, :4], nothing, tokens[:, 4:])]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens))


def test_a_memory_that_is_all_hidden_changes_nothing():
    """A stream that sees nothing of its memory, by a mask, by segments or because there is none, has what the output
    projection makes of zeros, and the memory no gradient; so does a decoder whose source is padding alone."""
    cross, x = randomise(CrossAttention(4, heads=2)), torch.randn(2, 3, 4).double()
    memory = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    for given in (
        {"memory": memory, "memory_seen": torch.zeros(2, 3, 5, dtype=torch.bool)},
        {"memory": memory, "segments": zeros, "memory_segments": torch.ones(2, 5, dtype=torch.int64)},
        {"memory": memory[:, :0]},
    ):
        out = cross(x, Context(**given))
        torch.testing.assert_close(out, cross.project.out.bias.expand_as(out))
        assert not torch.autograd.grad(out.sum(), memory, allow_unused=True)[0].any()
    model = randomise(recipe("transformer").set(Stack, depth=1)().build({"vocab": 11, "context": 9}))
    inputs, source = torch.randint(PADDING + 1, 11, (2, 5)), torch.full((2, 4), PADDING)
    logits = model(source, inputs)
    torch.testing.assert_close(logits, model(source[:, :1], inputs))
    logits.square().sum().backward()
    assert logits.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
