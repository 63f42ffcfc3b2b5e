"""What is counted equals a count by hand."""

import pytest
import torch
from torch import nn

from deltax import recipe
from deltax.lab import measure
from deltax.papers.language.attention.softmax_attention import attend
from deltax.train.job import task_of
from deltax.train.loop import build
from deltax.train.machine import Machine


def by_hand(dim: int, depth: int, context: int, vocab: int, tokens: int) -> int:
    """Forward: 24 D^2 for the matrices of a block, 4 T D for its two attention products, 2 D V for the head; backward
    twice that."""
    return 3 * tokens * (depth * (24 * dim**2 + 4 * context * dim) + 2 * dim * vocab)


def test_flops_of_gpt_are_those_counted_by_hand(tiny):
    assert measure.flops_per_step(recipe("gpt")) == by_hand(96, 3, 128, 256, 16 * 128)
    assert measure.flops_per_step(tiny()) == by_hand(8, 1, 16, 256, 4 * 16)
    for same in ("gpt+dyt", "gpt+alibi", "gpt+rms-norm"):
        assert measure.flops_per_step(tiny(same)) == measure.flops_per_step(tiny())


def test_counting_three_examples_is_counting_all(tiny):
    wide = tiny().put("loop.batch", 7).put("model.stack.depth", 2)
    assert measure.flops_per_step(wide) == measure._count(wide, 7) == by_hand(8, 2, 16, 256, 7 * 16)


def test_an_optimizers_products_are_counted_once_a_step(tiny, monkeypatch):
    """A constant part does not grow with the batch, and is not lost either."""
    from deltax.parts.training import optimizers

    class Squaring(torch.optim.SGD):
        def step(self):
            torch.ones(5, 5) @ torch.ones(5, 5)
            super().step()

    measure.flops_per_step.cache_clear()
    monkeypatch.setattr(optimizers.torch.optim, "AdamW", lambda groups, lr, **_: Squaring(groups, lr))
    assert measure.flops_per_step(tiny()) == by_hand(8, 1, 16, 256, 64) + 2 * 5**3
    measure.flops_per_step.cache_clear()


def test_fused_attention_is_counted_too(tiny):
    def fused(q, k, v, rules=None):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    globals()["fused"], fused.__qualname__ = fused, "fused"
    assert tiny()["model.stack.block.mixer.kernel"].target is attend
    assert measure.flops_per_step(tiny().put("model.stack.block.mixer.kernel", fused)) == by_hand(8, 1, 16, 256, 64)


def test_costs_of_gpt(tiny):
    cost = measure.cost(tiny())
    model = build(tiny()(), task_of(tiny()), 0)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.tokens_per_step == 64
    # Keys and values of one layer in float32, and the token's position.
    assert cost.state_bytes_per_token == 2 * 8 * 4 + 8
    # At least weights, gradients and two moments; at most those and 64 tokens' activations.
    assert 4 * 4 * cost.parameters < cost.peak_bytes < 4 * 4 * cost.parameters + 64 * 4 * 256 * 20


def test_peak_memory_is_what_is_held_at_once():
    with measure._Held() as held:
        a = torch.zeros(1000)
        b = a * 2
        del a
        c = b + 1
        view = c[:10]
        del b, c
    assert (held.now, held.peak) == (4000, 8000)
    del view
    assert held.now == 0


def test_peak_memory_is_the_same_whatever_was_measured_before_and_grows_with_the_batch(tiny):
    small, large = tiny(), tiny().put("loop.batch", 64)
    before = measure.peak_bytes(small, Machine())
    assert measure.peak_bytes(large, Machine()) > 2 * before
    assert measure.peak_bytes(small, Machine()) == before


def test_speed_is_timed_in_turns(tiny, monkeypatch):
    order = []

    class Clocked(measure.Stepper):
        def timed(self, steps):
            order.append(self.run.model["norm"].target.__name__)
            return 0.5 if order[-1] == "LayerNorm" else 0.25

    monkeypatch.setattr(measure, "Stepper", Clocked)
    found = measure.speed([tiny(), tiny("gpt+dyt")], blocks=3)
    assert order == ["LayerNorm", "DyT"] * 4
    assert found.seconds.tolist() == [[0.5] * 3, [0.25] * 3]
    assert found.tokens_per_second == [128, 256]


def test_speed_of_a_recipe_against_itself_is_one(tiny):
    found = measure.speed([tiny(), tiny()], blocks=2, steps=1)
    assert (found.seconds[0] == found.seconds[1]).all()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (372_576, "0.37M"),
        (2_048, "2k"),
        (61_000, "61k"),
        (1.24e8, "0.12B"),
        (204_800, "0.2M"),
        (12, "12"),
        (4.2e7, "42M"),
    ],
)
def test_numbers_as_papers_write_them(count, text):
    assert measure.millions(count) == text


def test_the_scale_of_a_verdict(tiny):
    assert measure.scale(recipe("gpt"), 400).startswith("0.37M parameters, 0.82M tokens, library of Python")
