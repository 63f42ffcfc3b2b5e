"""Claims of flash-attention: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.claims.agreement import is_attention
from deltax.claims.systems.attention_kernels.memory_efficient_attention import kept_bytes
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.flash_attention import flash_attention, fold
from deltax.papers.systems.attention_kernels.memory_efficient_attention import Tile
from deltax.parts.attention.scores import Rules, causal, everywhere, window


@claim
def it_is_attention():
    """For every rule, tile and length, output and gradients equal attention's (Theorem 1)."""
    is_attention(lambda tile: part(flash_attention, tile=tile), attend)


@claim
def tiles_nobody_looks_at_are_skipped():
    """On 8 x 8 tiles, the causal mask visits 36, no mask 64, and a window of one tile 15."""
    q = torch.randn(1, 64, 1, 2)
    for mask, visited in ((causal, 36), (everywhere, 64), (part(window, width=8), 15)):
        visits = _Transfers()
        fold(*(visits.slow(t) for t in (q, q, q)), Rules(mask=mask), visits, (8, 8))
        assert visits.tiles == visited


@claim
def what_is_kept_for_the_backward_pass_grows_with_length():
    """From 1024 to 2048 positions, FlashAttention saves exactly 2 times the bytes for backward, attention 3.9 to 4
    times.
    """

    def kept(kernel: Any, time: int) -> int:
        q, k, v = (torch.randn(1, time, 1, 4, requires_grad=True) for _ in range(3))
        return kept_bytes(lambda: kernel(q, k, v, Rules(mask=part(causal))))

    assert kept(part(flash_attention, tile=512), 2048) == 2 * kept(part(flash_attention, tile=512), 1024)
    assert 3.9 < kept(attend, 2048) / kept(attend, 1024) <= 4


@claim
def fewer_numbers_move():
    """At T = 1024, K = 64 and a fast memory of 32,768 numbers, FlashAttention moves under 1/4 (causal) and 1/2.4 (full)
    of attention's 4 T^2 + 4 T K numbers (Algorithm 0).

    Beyond one pass over keys, values and output, traffic is proportional to 1/M (Theorem 2). The row statistics are
    counted as moved, but not as part of M.
    """
    time, width = 1024, 64
    attention = 4 * time**2 + 4 * time * width
    assert attention > 4 * _moved(time, width, 32_768, causal)
    assert attention > 2.4 * _moved(time, width, 32_768, everywhere)
    once = time * (width - 2)  # keys and values, less the output and two numbers a row that a first visit need not read
    passes = [_moved(time, width, fast, everywhere) - once for fast in (32_768, 65_536, 131_072)]
    assert passes[0] == 2 * passes[1] == 4 * passes[2]


@claim.parity(peer="torch.nn.functional.scaled_dot_product_attention (the flash kernel for CPUs)")
def equals_torch():
    """At 61 positions, causal and full, output and gradients equal torch's fused flash kernel to 1e-12."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    for mask in (causal, everywhere):
        q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 61, 4, 16, dtype=torch.float64))
        weight = torch.randn_like(q)
        ours = flash_attention(q, k, v, Rules(mask=part(mask)), tile=16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            theirs = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=mask is causal).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@claim.measured(paper="the same perplexity, 18.2, 3.5 times sooner (GPT-2 small, Table 2)")
def it_learns_the_same(lab):
    """Each with its tuned learning rate, gpt and gpt + flash-attention end within 2 % of each other's compute."""
    return lab.compare("gpt", "gpt+flash-attention").equivalent


@claim.measured(paper="up to 20 times less memory than exact attention, linear in length (section 4.3, Figure 3)")
def memory_grows_with_length(lab):
    """The exponent of peak memory in length is at least 0.5 lower than attention's (to 32,768 and 8192 positions)."""
    import numpy as np
    from matplotlib.figure import Figure

    times = {"attend": (1024, 2048, 4096, 8192), "flash_attention": (2048, 8192, 32_768)}
    peak = lambda name, time: lab.peak_memory(_forward_and_backward, name, time, warm=(name, 64))
    peaks = {name: np.array([[peak(name, time) for time in at] for _ in range(2)]) for name, at in times.items()}
    exponent = lambda name, run: float(np.polyfit(np.log(times[name]), np.log(run), 1)[0])
    exponents = {name: [exponent(name, run) for run in runs] for name, runs in peaks.items()}
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in peaks.items():
        axes.loglog(times[name], runs.mean(0) / 2**20, marker="o", label=name.replace("_", " "))
    axes.set(xlabel="positions", ylabel="peak memory, MiB")
    axes.legend(frameon=False)
    gaps = [a - b for a, b in zip(*exponents.values(), strict=True)]
    numbers = {
        "exponents": exponents,
        "positions": times,
        "bytes": {name: runs.tolist() for name, runs in peaks.items()},
    }
    caption = "Memory of one forward and backward pass (1 example, 1 head of 64, causal), above the process's own"
    drawn = {caption: lab.figure(figure)}
    return lab.at_least(gaps, 0.5, unit="in the exponent", numbers=numbers, figures=drawn)


def _forward_and_backward(kernel: str, time: int) -> None:
    q, k, v = (torch.randn(1, time, 1, 64, requires_grad=True) for _ in range(3))
    kernels = {"attend": attend, "flash_attention": part(flash_attention, tile=512)}
    kernels[kernel](q, k, v, Rules(mask=part(causal))).sum().backward()


class _Transfers(dict):
    """A slow memory that counts the numbers moved. Holds the tiles of `fold` and hands out slices of tensors."""

    def __init__(self) -> None:
        self.moved, self.tiles = 0, 0

    def slow(self, x: Tensor) -> Tensor:
        x = x.as_subclass(_Slow)
        x.memory = self
        return x

    def __getitem__(self, i: int) -> Tile:
        return self._count(super().__getitem__(i))

    def __setitem__(self, i: int, tile: Tile) -> None:
        self.tiles += 1
        super().__setitem__(i, self._count(tile))

    def _count(self, tile: Tile) -> Tile:
        self.moved += tile.out.numel() + tile.seen.max.numel() + tile.seen.sum.numel()
        return tile


class _Slow(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # what is handed out is a plain tensor
    memory: _Transfers

    def __getitem__(self, place: Sequence[slice]) -> Tensor:
        piece = super().__getitem__(place)
        self.memory.moved += piece.numel()
        return piece


def _moved(time: int, width: int, fast: int, mask: Any) -> int:
    """The numbers that `fold` moves with the paper's tile sizes (Algorithm 1, line 1)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, time, 1, width, dtype=torch.float64)
    columns = -(-fast // (4 * width))
    rows = min(columns, width)
    resident = 2 * columns * width + 2 * rows * width + rows * columns  # keys and values, queries and output, scores
    assert resident <= fast
    memory, rules = _Transfers(), Rules(mask=part(mask))
    fold(memory.slow(q), memory.slow(k), memory.slow(v), rules, memory, (rows, columns))
    out = torch.cat([tile.out for _, tile in sorted(memory.items())], 1)
    torch.testing.assert_close(out, attend(q, k, v, rules), rtol=1e-12, atol=1e-12)
    return memory.moved
