"""Claims of flash-attention-2: the paper's equations, parity with peers, and what it measures."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltax import claim, part
from deltax.claims.agreement import is_attention
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import flash_attention
from deltax.papers.systems.attention_kernels.flash_attention_2 import _own, flash_attention_2
from deltax.papers.systems.attention_kernels.memory_efficient_attention import finish
from deltax.parts.attention.scores import Rules, causal, everywhere, window
from deltax.parts.attention.tiles import tiles


@claim
def it_is_attention():
    """For every rule, tile and length, output and gradients equal attention's."""
    is_attention(lambda tile: part(flash_attention_2, tile=tile), attend)


@claim
def the_output_is_scaled_once_a_visit():
    """FlashAttention rescales an output twice a visit after the first; version 2 once a visit and once at the end."""
    q, k, v = torch.randn(3, 1, 64, 3, 4, dtype=torch.float64)
    for mask, visits in ((everywhere, 64), (causal, 36), (part(window, width=8), 15)):
        rules, owners = Rules(mask=part(mask)), 8
        counts = []
        for kernel in (flash_attention, flash_attention_2):
            with _Scalings((1, 8, 3, 4), (1, 64, 3, 4)) as scalings, torch.no_grad():
                kernel(q, k, v, rules, tile=8)
            counts.append(scalings.tiles)
        assert counts == [owners + 2 * (visits - owners), visits + owners]


@claim
def tiles_in_the_future_are_not_visited():
    """Under a causal mask, future keys and values set to NaN change no row: outputs equal attention's to 1e-12."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 2, 4, dtype=torch.float64)
    rules = Rules(mask=part(causal))
    right = attend(q, k, v, rules)
    for i, rows in enumerate(tiles(64, 8)):
        unread = k.clone(), v.clone()
        for t in unread:
            t[:, 8 * (i + 1) :] = torch.nan
        torch.testing.assert_close(finish(_own(q, *unread, rules, rows, 8)), right[:, rows], rtol=1e-12, atol=1e-12)


class _Scalings(TorchDispatchMode):
    """Counts elementwise multiplications and divisions of output tiles; one of `whole` counts for all its tiles."""

    def __init__(self, tile: tuple[int, ...], whole: tuple[int, ...]):
        super().__init__()
        self.tile, self.whole, self.tiles = tile, whole, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
            self.tiles += {self.tile: 1, self.whole: self.whole[1] // self.tile[1]}.get(tuple(out.shape), 0)
        return out
