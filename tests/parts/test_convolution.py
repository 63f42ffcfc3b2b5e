"""A frozen batch norm is a batch norm that is never trained."""

import torch
from torch import nn

from deltax.parts.model.convolution import FrozenBatchNorm


def test_frozen_batch_norm_is_batch_norm_in_use():
    torch.manual_seed(0)
    frozen, plain = FrozenBatchNorm(5).double(), nn.BatchNorm2d(5).double().eval()
    state = {k: 0.5 + torch.rand_like(v) if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    plain.load_state_dict(state), frozen.load_state_dict(state)
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(frozen.train()(x), plain(x))
    assert all(torch.equal(v, state[k]) for k, v in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
