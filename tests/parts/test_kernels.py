"""Fast twins give what their references give, forward and backward, and leave parameters where they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deltax import part
from deltax.kernels import mlp as mlp_kernel
from deltax.kernels.attention import sdpa
from deltax.kernels.losses import saved_probabilities
from deltax.kernels.mlp import SavedGeluDerivative
from deltax.kernels.projections import FusedQKV, _joined
from deltax.kernels.short_attention import FEW, suits, weights_kept
from deltax.papers.language.attention.softmax_attention import Projections, attend
from deltax.parts.attention.scores import Rules, causal, window
from deltax.parts.attention.scratch import VIEWS_KEPT, scratch
from deltax.parts.model.linear import LinearNoBias, OutProjNoBias
from deltax.parts.model.mlp import MLP, gelu
from deltax.parts.training.objectives import next_token


def gradients(outputs, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs), inputs)


def random_pair(ours, theirs):
    """The two modules in float64, with the same parameters, all of them random."""
    for parameter in theirs.double().parameters():
        nn.init.normal_(parameter)
    ours.double().load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def calls(monkeypatch):
    """How often the fused branch was taken."""
    taken, fused = [], mlp_kernel._UpGeluDown.apply
    monkeypatch.setattr(mlp_kernel._UpGeluDown, "apply", lambda *given: taken.append(1) or fused(*given))
    return taken


def test_a_kept_slope_is_that_of_gelu(calls):
    torch.manual_seed(0)
    ours, theirs = random_pair(SavedGeluDerivative(5, widen=3), MLP(5, widen=3))
    x = (4 * torch.randn(2, 7, 5, dtype=torch.float64)).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x))
    used = lambda m: [x, *m.parameters()]
    torch.testing.assert_close(gradients([ours(x)], used(ours)), gradients([theirs(x)], used(theirs)))
    assert calls


def test_scratch_is_not_what_is_kept():
    """Two passes alive at once, of other sizes, each with its own gradient, twice the same."""
    torch.manual_seed(0)
    ours, theirs = random_pair(SavedGeluDerivative(5), MLP(5))
    inputs = [torch.randn(1, n, 5, dtype=torch.float64, requires_grad=True) for n in (6, 9)]
    kept, true = ([m(x) for x in inputs] for m in (ours, theirs))
    for y, expected, x in zip(kept, true, inputs, strict=True):
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], wanted)


def test_scratch_grows_and_serves_inference_and_training():
    with torch.inference_mode():
        small = scratch("test", (2, 3), torch.ones(1))
    small.fill_(1.0)  # an inference tensor would refuse
    assert scratch("test", (3, 1), torch.ones(1)).data_ptr() == small.data_ptr()
    large = scratch("test", (5, 3), torch.ones(1))
    assert large.shape == (5, 3)
    assert scratch("test", (2, 3), torch.ones(1)).data_ptr() == large.data_ptr()
    assert scratch("test", (2, 3), torch.ones(1).double()).dtype == torch.float64


def test_scratch_keeps_few_views_and_nothing_once_cleared():
    one = torch.ones(1)
    assert scratch("test", (2, 3), one) is scratch("test", (2, 3), one)
    for size in reversed(range(VIEWS_KEPT + 1)):  # the first is the largest: none of the others needs more memory
        scratch("test", (size,), one)
    assert 0 < len(scratch.views) <= VIEWS_KEPT
    scratch.clear()
    assert not scratch.held and not scratch.views


def test_what_is_not_plain_goes_the_way_of_the_mlp(calls):
    torch.manual_seed(0)
    x, seen = torch.randn(1, 3, 5, dtype=torch.float64), []
    for slots in ({"activation": part(gelu)}, {"up": part(LinearNoBias)}):
        ours, theirs = random_pair(SavedGeluDerivative(5, **slots), MLP(5, **slots))
        torch.testing.assert_close(ours(x), theirs(x))
    listened = SavedGeluDerivative(5).double()
    listened.down.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(listened(x), seen[0])
    with torch.no_grad():
        SavedGeluDerivative(5).double()(x)
    assert not calls


def test_frozen_parameters_get_no_gradient():
    ours = SavedGeluDerivative(5)
    ours.up.requires_grad_(False)
    ours(torch.randn(1, 3, 5)).sum().backward()
    assert ours.up.weight.grad is None and ours.up.bias.grad is None
    assert ours.down.weight.grad.abs().min() > 0


@pytest.mark.parametrize("time", [1, 2, 7, 64])
def test_kept_weights_are_those_of_attend(time):
    torch.manual_seed(0)
    together = torch.randn(2, time, 3 * 15, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.unflatten(-1, (3, 5)) for x in together.chunk(3, -1))
    rules = Rules(mask=part(causal))
    assert suits(q, k, v, rules)
    ours, theirs = weights_kept(q, k, v), attend(q, k, v, rules)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients([ours], [together]), gradients([theirs], [together]))


def test_what_attention_returns_is_not_scratch():
    """Of one head, whose transposed memory needs no copy, two passes stay apart."""
    q, k, v = (torch.randn(1, 5, 1, 4, requires_grad=True) for _ in range(3))
    first = weights_kept(q, k, v)
    kept = first.detach().clone()
    grad = torch.autograd.grad(first.sum(), v, retain_graph=True)[0]
    before = grad.clone()
    weights_kept(3 * q, k, 2 * v).sum().backward()
    assert torch.equal(first, kept) and torch.equal(grad, before)


def test_weights_are_kept_where_few_look_back_in_training():
    heads = lambda time, count=2: torch.randn(1, time, count, 4, requires_grad=True)
    few, many, shared, back = heads(8), heads(FEW + 1), heads(8, 1), Rules(mask=part(causal))
    assert suits(few, few, few, back)
    near = Rules(mask=part(window, width=3))
    for q, k, rules in ((many, many, back), (few, shared, back), (few, heads(9), back), (few, few, near)):
        assert not suits(q, k, k, rules)
    assert not suits(few, few, few, Rules())
    with torch.no_grad():
        assert not suits(few, few, few, back)


def test_a_bias_without_blind_rows_is_handed_over_as_it_is():
    """With segments, positions and windows of their own, sdpa is attend, whether or not a query may be blind."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    segments, other = torch.tensor([[0] * 4 + [1] * 5, [0] * 9]), torch.tensor([[0] * 4 + [2] * 5, [0] * 9])
    at = torch.arange(9)
    for rules, sees in (
        (Rules(mask=part(causal), q_segments=segments, k_segments=segments), True),
        (Rules(mask=part(window, width=3), q_at=at, k_at=at), True),
        (Rules(mask=part(causal), q_segments=segments, k_segments=other), False),
        (Rules(mask=part(causal), q_at=at, k_at=at + 2), False),
    ):
        assert rules.sees_itself is sees
        torch.testing.assert_close(sdpa(q, k, v, rules), attend(q, k, v, rules))


@pytest.mark.parametrize("bare", [(), ("key",), ("query", "key", "value")])
def test_side_by_side_is_one_after_the_other(bare):
    torch.manual_seed(0)
    slots = {name: part(LinearNoBias) for name in bare}
    ours, theirs = random_pair(*(make(12, 3, **slots, out=part(OutProjNoBias)) for make in (FusedQKV, Projections)))
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    memory, values = (torch.randn(2, time, 12, dtype=torch.float64) for time in (5, 7))
    for given in ((x, x, x), (x,), (x, memory), (x, x, values)):
        a, b = ours.split(*given), theirs.split(*given)
        torch.testing.assert_close(a, b)
        used = lambda m: [x, *(p for n, p in m.named_parameters() if not n.startswith("out"))]
        torch.testing.assert_close(gradients(a, used(ours)), gradients(b, used(theirs)))


def test_a_frozen_projection_gets_no_gradient():
    """Nor does an x that wants none; the others get theirs."""
    torch.manual_seed(0)
    ours, theirs = random_pair(FusedQKV(12, 3), Projections(12, 3))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for module in (ours, theirs):
        module.key.requires_grad_(False)
    used = lambda m: [*m.query.parameters(), *m.value.parameters()]
    torch.testing.assert_close(gradients(ours.split(x), used(ours)), gradients(theirs.split(x), used(theirs)))
    sum(y.sum() for y in ours.split(x)).backward()
    assert ours.key.weight.grad is None and ours.query.weight.grad.abs().min() > 0


def test_what_lies_side_by_side_is_joined_without_a_copy():
    whole = torch.randn(2, 5, 6)
    a, b, c = whole.split([1, 2, 3], -1)
    assert _joined([a, b, c]).data_ptr() == whole.data_ptr() and torch.equal(_joined([a, b, c]), whole)
    for parts in ((a, c, b), (a, a), (a, b), (b, c), (a.clone(), b), (b[:, :4], c[:, :4])):
        assert torch.equal(_joined(list(parts)), torch.cat(parts, -1))


def test_a_hook_on_a_projection_is_called():
    ours, seen = FusedQKV(12, 3), []
    ours.key.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, k, _ = ours.split(torch.randn(1, 4, 12))
    assert torch.equal(seen[0].unflatten(-1, (3, 4)), k)


def test_the_loss_that_keeps_chances_is_cross_entropy():
    """Where most targets do not count, or a whole sequence, and where the target's chance is below what floats hold."""
    torch.manual_seed(0)
    for scale in (1, 30, 300):
        logits = (scale * torch.randn(3, 7, 11)).requires_grad_()
        targets = torch.randint(0, 11, (3, 7))
        targets[0, 2:], targets[1] = -100, -100
        batch = SimpleNamespace(inputs=logits, targets=targets)
        ours, theirs = (objective(nn.Identity(), batch) for objective in (saved_probabilities, next_token))
        torch.testing.assert_close(ours, theirs)
        for _ in range(2):
            wanted, given = (
                torch.autograd.grad(y @ torch.arange(1.0, 4), logits, retain_graph=True) for y in (ours, theirs)
            )
            torch.testing.assert_close(wanted, given)
        with torch.no_grad():
            assert torch.equal(saved_probabilities(nn.Identity(), batch), next_token(nn.Identity(), batch))


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_is_as_bad_as_in_cross_entropy(strange):
    logits = torch.randn(1, 3, 5)
    logits[0, 1, 2] = strange
    logits.requires_grad_()
    batch = SimpleNamespace(inputs=logits, targets=torch.tensor([[2, 2, 4]]))
    ours, theirs = (objective(nn.Identity(), batch) for objective in (saved_probabilities, next_token))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not ours.isfinite().all()


def test_every_twin_names_a_reference_that_is_there():
    from deltax import address
    from deltax.kernels import twins

    declared = twins._declared()
    assert {"papers.softmax_attention:attend", "parts.mlp:MLP", "papers.flash_attention:flash_attention"} <= set(
        declared
    )
    for of, found in declared.items():
        assert twins.twins_of(address.find(of)) == found
        for twin in found:
            assert twin.on in ("any", "cpu", "cuda", "triton") and twin.why
            assert twin.on == "triton" or twin.load().__name__ == twin.name


def test_a_twin_of_one_device_comes_before_that_of_any():
    from deltax.kernels.twins import twins_of
    from deltax.papers.language.attention.softmax_attention import attend

    pick = lambda device: next(twin.name for twin in twins_of(attend) if twin.runs_on(device))
    assert (pick("cpu"), pick("cuda")) == ("sdpa", "auto")
