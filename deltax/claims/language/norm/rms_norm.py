"""Claims of rms-norm: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.language.norm.rms_norm import RMSNorm
from deltax.papers.optimization.normalization.layer_norm import LayerNorm


@claim
def is_the_equation():
    """The output equals Eq. 4, computed directly."""
    torch.manual_seed(0)
    norm, x = _random(RMSNorm(7)), torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(x), norm.gain * x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps))


@claim
def on_centred_input_it_is_layer_norm():
    """On inputs of mean zero RMSNorm equals LayerNorm without bias; on other inputs it differs."""
    torch.manual_seed(0)
    rms, layer = _random(RMSNorm(7)), LayerNorm(7).double()
    layer.gain.data.copy_(rms.gain.data)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms(centred), layer(centred))
    assert not torch.allclose(rms(x), layer(x))


@claim.parity(peer="torch.nn.RMSNorm")
def equals_torch():
    """With the same gain, output and gradients equal those of torch's RMSNorm."""
    torch.manual_seed(0)
    ours, theirs = _random(RMSNorm(7)), nn.RMSNorm(7, eps=1e-5).double()
    theirs.load_state_dict({"weight": ours.gain.detach()})
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    weight = torch.randn_like(x)
    (ours(x) * weight).sum().backward()
    (theirs(x) * weight).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.gain.grad, theirs.weight.grad)


@claim.measured(paper="comparable quality in 7 to 64 % less running time (abstract)")
def recentring_is_unnecessary(lab):
    """Both with tuned learning rates, gpt and gpt + rms-norm reach the same loss with compute that differs by at most
    2 %.
    """
    return lab.compare("gpt", "gpt+rms-norm").equivalent


def _random(norm: RMSNorm) -> RMSNorm:
    nn.init.normal_(norm.gain)
    return norm.double()
