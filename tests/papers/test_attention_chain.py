"""Every link of the chain from online softmax to rings is attention: one check, put to each."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltax import UserError, kernels, part, recipe
from deltax.claims.agreement import agree, every_rule
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels.bpt import bpt
from deltax.papers.systems.attention_kernels.flash_attention import flash, flash_attention
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_2, flash_attention_2
from deltax.papers.systems.attention_kernels.memory_efficient_attention import (
    memory_efficient,
    memory_efficient_attention,
)
from deltax.papers.systems.attention_kernels.ring_attention import ring, ring_attention
from deltax.papers.systems.performance.activation_checkpointing import activation_checkpointing, checkpoint, segments
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.scores import Rules, causal, window

KERNELS = {
    "memory-efficient-attention": part(memory_efficient_attention, queries=7, keys=12),
    "flash-attention": part(flash_attention, tile=7),
    "flash-attention-2": part(flash_attention_2, tile=7),
    "ring-attention": part(ring_attention, tile=7),
}
DELTAS = {
    "activation-checkpointing": activation_checkpointing,
    "memory-efficient-attention": memory_efficient(queries=4, keys=5),
    "flash-attention": flash(tile=4),
    "flash-attention-2": flash_2(tile=4),
    "bpt": bpt(tile=4),
    "ring-attention": ring(tile=4),
}
RULES = [*every_rule(3), "alibi, windowed and padded"]


def rules_of(name, time):
    if name in every_rule(3):
        return every_rule(time)[name]
    padded = every_rule(time)["padded"]
    return replace(padded, score=Distance(6), mask=part(window, width=9))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_attention(kernel, rule):
    """Forward and gradients to 1e-12 in float64, at an odd length, with 6 query heads on 2 key heads."""
    agree(KERNELS[kernel], attend, rules_of(rule, 31), queries=31, keys=31)


@pytest.mark.parametrize("base", ["gpt", "gpt+alibi", "gpt+rope", "gpt+post-norm"])
@pytest.mark.parametrize("delta", DELTAS)
def test_a_model_with_it_is_the_model_without(delta, base):
    """Logits and the gradients of all weights, with padding; and step by step, under a decoding state."""
    small = recipe(base).put("model.dim", 12).put("model.stack.depth", 2)
    plain, changed = (r().build({"vocab": 11, "context": 13}).double() for r in (small, small + DELTAS[delta]))
    torch.manual_seed(0)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    changed.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 13))
    padded = (torch.arange(13) >= torch.tensor([[9], [13]])).long()
    found = []
    for model in (plain, changed):
        logits = model(tokens, Context(segments=padded))
        functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ctx = Context(state=DecodingState())
    steps = [changed(piece, ctx) for piece in tokens.split([4, 1, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), plain(tokens), rtol=1e-11, atol=1e-11)


def test_checkpointed_blocks_that_go_tile_by_tile_are_still_the_blocks():
    small = gpt.put("model.dim", 12).put("model.stack.depth", 4)
    both = small + bpt(tile=4) + activation_checkpointing(count=2)
    plain, changed = (r().build({"vocab": 11, "context": 13}).double() for r in (small, both))
    changed.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 13))
    for model in (plain, changed):
        model(tokens).square().sum().backward()
    for a, b in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
def test_low_precision_follows_autocast_and_its_gradients_do_too(kernel):
    torch.manual_seed(0)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 61, 4, 16))
    rules, weight = Rules(mask=part(causal)), torch.randn(2, 61, 4, 16)
    exact = attend(q, k, v, rules)
    expected = torch.autograd.grad((exact * weight).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = KERNELS[kernel](q, k, v, rules)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    for a, b in zip(torch.autograd.grad((out.float() * weight).sum(), (q, k, v)), expected, strict=True):
        assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_was_never_written_is_never_read(kernel):
    """With uninitialised memory filled with NaN, output and gradients are finite."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        q = torch.randn(1, 31, 2, 4, requires_grad=True)
        out = KERNELS[kernel](q, q, q, rules_of("windowed", 31))
        (gradient,) = torch.autograd.grad(out.sum(), q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all() and gradient.isfinite().all()


def test_flops_are_counted_on_the_reference():
    for delta in (memory_efficient, flash, flash_2):
        assert kernels.reference(gpt + delta(**{"queries": 9} if delta is memory_efficient else {"tile": 9})) == gpt


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(5, 5), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x))


def test_a_checkpoint_under_autocast_is_the_function_under_autocast():
    torch.manual_seed(0)
    ours, x = Noisy(), torch.randn(3, 5)
    theirs = copy.deepcopy(ours)
    for module, run in ((ours, lambda m: checkpoint(m, x)), (theirs, lambda m: m(x))):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(module)
        out.float().square().sum().backward()
    assert torch.equal(ours.linear.weight.grad, theirs.linear.weight.grad)


def test_autograd_grad_cannot_see_what_a_checkpoint_closes_over():
    module, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UserError, match=r"use \.backward\(\)"):
        torch.autograd.grad(checkpoint(module, x).sum(), x)
    assert torch.equal(torch.autograd.grad(checkpoint(torch.square, x).sum(), x)[0], 2 * x)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gpt + bpt(tile=0), "at least 1"),
        (lambda: gpt + ring(tile=0), "at least 1"),
        (lambda: gpt + flash_2(tile=-1), "at least 1"),
        (lambda: gpt + memory_efficient(keys=0), "at least 1"),
        (lambda: segments(4, 5), "1 to 4 segments"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_segments_are_even_and_cover_all():
    for count in (1, 2, 7, 16, 30):
        for of in (None, 1, count):
            cuts = segments(count, of)
            lengths = [c.stop - c.start for c in cuts]
            assert sum(lengths) == count and max(lengths) - min(lengths) <= 1
    assert len(segments(16)) == 4
