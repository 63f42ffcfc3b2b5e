"""Fast twins give what their references give, forward and backward, and leave parameters where they are."""

import pytest
import torch
from torch import nn

from deltax import part
from deltax.kernels.activation import gelu_kept
from deltax.kernels.projections import SideBySide
from deltax.papers.language.softmax_attention import Projections
from deltax.parts.linear import Matrix, OutMatrix
from deltax.parts.mlp import gelu_tanh


def gradients(outputs, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((y * torch.randn_like(y)).sum() for y in outputs), inputs)


def test_the_kept_gelu_is_gelu():
    x = torch.linspace(-9, 9, 217, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gelu_kept(x), gelu_tanh(x))
    torch.testing.assert_close(gradients([gelu_kept(x)], [x]), gradients([gelu_tanh(x)], [x]))
    kept = gelu_kept(x)
    assert torch.equal(*(torch.autograd.grad(kept.sum(), x, retain_graph=True)[0] for _ in range(2)))


@pytest.mark.parametrize("bare", [(), ("key",), ("query", "key", "value")])
def test_side_by_side_is_one_after_the_other(bare):
    torch.manual_seed(0)
    slots = {name: part(Matrix) for name in bare}
    ours, theirs = (make(12, 3, **slots, out=part(OutMatrix)).double() for make in (SideBySide, Projections))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    memory, values = (torch.randn(2, time, 12, dtype=torch.float64) for time in (5, 7))
    for given in ((x, x, x), (x,), (x, memory), (x, x, values)):
        a, b = ours.split(*given), theirs.split(*given)
        torch.testing.assert_close(a, b)
        used = lambda m: [x, *(p for n, p in m.named_parameters() if not n.startswith("out"))]
        torch.testing.assert_close(gradients(a, used(ours)), gradients(b, used(theirs)))


def test_a_hook_on_a_projection_is_called():
    ours, seen = SideBySide(12, 3), []
    ours.key.register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, k, _ = ours.split(torch.randn(1, 4, 12))
    assert torch.equal(seen[0].unflatten(-1, (3, 4)), k)
