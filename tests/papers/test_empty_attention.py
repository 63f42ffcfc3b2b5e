"""Attention over nothing: no queries give no rows, queries without keys give zeros, with gradients, in every kernel."""

import pytest
import torch

from deltax.kernels.attention import sdpa
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import flash_attention
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_attention_2
from deltax.papers.systems.attention_kernels.flex_attention import flex_attention
from deltax.papers.systems.attention_kernels.memory_efficient_attention import memory_efficient_attention
from deltax.papers.systems.attention_kernels.ring_attention import ring_attention
from deltax.papers.systems.attention_kernels.sage_attention import sage_attention
from deltax.papers.systems.attention_kernels.sage_attention_2 import sage_attention_2
from deltax.parts.attention.scores import Rules, causal, everywhere

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
