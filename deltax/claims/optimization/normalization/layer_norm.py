"""Claims of layer-norm: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.optimization.normalization.layer_norm import LayerNorm


def standardise(x: Tensor, eps: float = 0.0) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, with the biased variance (Eq. 3); the reference."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


@claim
def is_the_equation():
    """The module is Eq. 3 and Eq. 4, written out."""
    torch.manual_seed(0)
    norm, x = _random(LayerNorm(7)), torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(x), norm.gain * standardise(x, norm.eps) + norm.bias)


@claim
def shift_and_scale_are_forgotten():
    """LN(a x + c) = LN(x) for every a > 0 and c, when eps is 0."""
    torch.manual_seed(0)
    norm, x = _random(LayerNorm(7, eps=0.0)), torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(3.7 * x - 11.0), norm(x))
    assert not torch.allclose(norm(-x), norm(x))


@claim
def no_example_waits_for_another():
    """Changing one example of a batch leaves the others' outputs as they were, to the bit."""
    torch.manual_seed(0)
    norm, x = _random(LayerNorm(7)), torch.randn(3, 5, 7, dtype=torch.float64)
    other = x.clone()
    other[1] = torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(norm(x)[[0, 2]], norm(other)[[0, 2]])


@claim.parity(peer="torch.nn.LayerNorm")
def equals_torch():
    """The same gain and bias give torch's output and gradients."""
    torch.manual_seed(0)
    ours, theirs = _random(LayerNorm(7)), nn.LayerNorm(7).double()
    theirs.load_state_dict({"weight": ours.gain.detach(), "bias": ours.bias.detach()})
    x, y = (torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    weight = torch.randn(2, 5, 7, dtype=torch.float64)
    (ours(x) * weight).sum().backward()
    (theirs(y) * weight).sum().backward()
    torch.testing.assert_close(ours(x), theirs(y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.gain.grad, theirs.weight.grad)


@claim.measured(paper="Figure 2 of arXiv:2503.10622: the outputs of a trained LayerNorm over its inputs draw an S")
def a_trained_norm_draws_an_s(lab):
    """In a trained gpt's last block, what LayerNorm gives follows tanh(a x) of what it is given: correlation 0.95."""
    correlations = []
    for seed in lab.seeds(3):
        run = lab.train("gpt", seed=seed)
        norm = run.model.stack.blocks[-1].mlp_residual.norm
        given, gave = run.watch(norm)
        standard = (gave - norm.bias) / norm.gain
        slopes = torch.logspace(-2, 2, 81)
        correlations.append(max(_correlation(torch.tanh(a * given), standard) for a in slopes))
    return lab.at_least(correlations, 0.95, unit="correlation")


def _random(norm: LayerNorm) -> LayerNorm:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.double()


def _correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
