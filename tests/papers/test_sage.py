"""What the claims of the two SageAttentions, kernel fusion and the softmax worklog leave open: edges and bad input."""

import math
from types import SimpleNamespace

import pytest
import torch

from deltax import UserError, part
from deltax.claim import Verdict
from deltax.claims.systems.attention_kernels import sage_attention as first_claims
from deltax.claims.systems.attention_kernels import sage_attention_2 as second_claims
from deltax.claims.systems.performance.kernel_fusion import encoder_layer
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels import sage_attention as first
from deltax.papers.systems.attention_kernels import sage_attention_2 as second
from deltax.papers.systems.attention_kernels.online_softmax_cuda import softmax
from deltax.papers.systems.performance.kernel_fusion import fuse, fused, moved
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.scores import Rules, causal, window


@pytest.mark.parametrize("kernel", [first.sage_attention, second.sage_attention_2], ids=["sage", "sage_2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_near_attention_under_every_rule(kernel, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, t, h, 16).to(dtype) for t, h in ((131, 4), (131, 2), (131, 2)))
    padded = (torch.arange(131) >= torch.tensor([[100], [131]])).long()
    for rules in (
        Rules(mask=part(causal)),
        Rules(mask=part(window, width=70)),
        Rules(Distance(4), part(causal)),
        Rules(q_segments=padded, k_segments=padded),
        Rules(lambda s, b, h, i, j: 3 * torch.tanh(s / 3), part(causal)),
    ):
        out, exact = kernel(q, k, v, rules), attend(q.double(), k.double(), v.double(), rules)
        assert out.dtype == dtype and out.shape == q.shape
        assert first_claims.similarity(out, exact) > (0.9995 if kernel is first.sage_attention else 0.97)


@pytest.mark.parametrize("kernel", [first.sage_attention, second.sage_attention_2], ids=["sage", "sage_2"])
def test_a_query_that_sees_nothing_gets_nothing_and_constants_make_no_nan(kernel):
    q, k, v = torch.zeros(1, 3, 2, 4), torch.ones(1, 5, 2, 4), torch.zeros(1, 5, 2, 4)
    out = kernel(q, k, v, Rules(q_segments=torch.tensor([[0, 0, 1]]), k_segments=torch.zeros(1, 5).long()))
    assert not out.any()
    ones = kernel(torch.zeros(1, 1, 2, 4), k, torch.ones(1, 5, 2, 4))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=2e-3, atol=0)


def test_eight_bits_are_nearer_than_four():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 131, 2, 16)
    exact = attend(q, k, v)
    four, eight = (first_claims.similarity(second.sage_attention_2(q, k, v, largest=n), exact) for n in (7, 127))
    assert eight > four
    assert (gpt + second.sage_2(largest=127))["model.stack.block.mixer.kernel.largest"] == 127


@pytest.mark.parametrize("paper", [first.sage, second.sage_2], ids=["sage", "sage_2"])
def test_a_gpt_with_it_decodes_and_does_not_train(paper):
    torch.manual_seed(0)
    recipe = gpt.put("model.dim", 36).put("model.stack.depth", 1)
    plain, model = (r().build({"vocab": 11, "context": 9}).eval() for r in (recipe, recipe + paper))
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 9))
    with torch.no_grad():
        whole, ctx = model(tokens), Context(state=DecodingState())
        steps = torch.cat([model(piece, ctx) for piece in tokens.split([4, 1, 4], 1)], 1)
        near = 0.02 * plain(tokens).std()
        assert (whole - plain(tokens)).abs().mean() < near and (steps - plain(tokens)).abs().mean() < near
    with pytest.raises(UserError, match="train with another kernel"):
        model(tokens).sum().backward()


def test_the_measured_claims_reach_a_verdict():
    """With a lab that trains nothing: the path from a model to its verdict runs, and the kernel is in it."""
    built, recipe = [], gpt.put("model.dim", 36).put("model.stack.depth", 1)

    class Task(SimpleNamespace):
        def evaluate(self, model, objective):
            built.append(model)
            return SimpleNamespace(score=1.25)

    def train(given, *, seed, steps):
        assert given == recipe and steps == 100
        task = Task(facts={"vocab": 11, "context": 9})
        return SimpleNamespace(task=task, score=1.0, model=recipe().build(task.facts))

    lab = SimpleNamespace(
        seeds=lambda n: range(n),
        recipe=lambda name: recipe,
        train=train,
        at_most=lambda values, most, unit: Verdict("inconclusive", "nothing", sum(values), unit=unit),
        at_least=lambda values, least, unit, numbers: Verdict("inconclusive", "nothing", min(values), numbers=numbers),
    )
    for paper, kernel in ((first_claims, first.sage_attention), (second_claims, second.sage_attention_2)):
        verdict = paper.a_trained_model_hardly_notices(lab)
        assert verdict.estimate == pytest.approx(0.75)
        assert built[-1].stack.blocks[0].mixer.kernel.make is kernel
    lab.seeds = lambda n: [0] * n
    found = second_claims.four_bits_need_both_smoothings_and_fine_groups(lab)
    assert list(found.numbers) == list(second_claims._variants(*first_claims.with_outliers(0, of_queries=10.0)))
    assert math.isfinite(first_claims.keys_with_outliers_need_smoothing(lab).estimate)


def test_nothing_is_fused_that_others_read():
    operators, sizes = encoder_layer(b=2, t=5, h=3, k=7)
    one = fuse(operators, "scale", "weight dropout")
    (made,) = [op for op in one if "softmax" in op.name]
    assert made.reads == ("scores",) and set(made.writes) == {"dropped", "wmask"}
    assert moved(operators, sizes) - moved(one, sizes) == 4 * 2 * 3 * 5 * 5
    (norm,) = [op for op in fuse(operators, "bias 1", "norm 1") if "norm 1" in op.name]
    assert norm.reads == ("out", "x") and set(norm.writes) == {"mask1", "normed1"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: first.blocks(5, 0), "at least 1"),
        (lambda: first.sage_attention(*torch.randn(3, 1, 2, 1, 2), queries=0), "at least 1"),
        (lambda: fused(torch.sin, block=0), "at least 1"),
        (lambda: fuse(encoder_layer()[0], "norm 1", "scale"), "no stretch"),
        (lambda: softmax(torch.randn(3), threads=48), "power of two"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
