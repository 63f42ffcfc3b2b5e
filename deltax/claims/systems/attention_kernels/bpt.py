"""Claims of bpt: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deltax import claim, part
from deltax.claims.agreement import Capped, slope
from deltax.papers.language.attention.softmax_attention import Attention, attend
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.systems.attention_kernels.bpt import tile_by_tile
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_attention_2
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal, window
from deltax.parts.model.mlp import MLP
from deltax.parts.model.stack import Block, PostNorm, PreNorm, Stack, in_turn


def _block(tile: int, **parts: Any) -> tuple[Block, Block]:
    """A plain block and a tiled one with the same random weights."""
    mixer = part(Attention, heads=3, **{"mask": causal, **parts.pop("attention", {})})
    settings = {"mixer": mixer, "mlp": part(MLP), "residual": part(PreNorm, norm=LayerNorm), **parts}
    kernel = part(flash_attention_2, tile=tile)
    plain = Block(12, **settings).double()
    tiled = Block(12, **{**settings, "mixer": part(mixer, kernel=kernel)}, branches=part(tile_by_tile, tile=tile))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    tiled.double().load_state_dict(plain.state_dict())
    return plain, tiled


def _agree(plain: Block, tiled: Block, ctx: Context, time: int = 31) -> None:
    """Asserts that output and all gradients, also of the context, are equal to 1e-12."""
    x = torch.randn(2, time, 12, dtype=torch.float64)
    place = torch.randn_like(x)
    weight, found = torch.randn_like(x), []
    for block in (plain, tiled):
        leaves = [t.clone().requires_grad_() for t in (x, place)]
        out = block(leaves[0], replace(ctx, place=leaves[1]))
        (out * weight).sum().backward()
        found.append([out, *(t.grad for t in leaves), *(p.grad for p in block.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@claim
def it_is_the_block():
    """With tiles of 7, 30 and 64 on 31 positions, pre- and post-norm, output and all gradients equal the plain block's
    to 1e-12.
    """
    torch.manual_seed(0)
    for tile in (7, 30, 64):
        for residual in (part(PreNorm, norm=LayerNorm), part(PostNorm, norm=LayerNorm)):
            _agree(*_block(tile, residual=residual), Context())


@claim
def whatever_the_rules():
    """With windows, ALiBi slopes, capped scores, padding and shuffled positions, output and gradients equal the plain
    block's to 1e-12.
    """
    torch.manual_seed(0)
    padded = (torch.arange(31) >= torch.tensor([[25], [31]])).long()
    shuffled = torch.stack([torch.randperm(31), torch.randperm(31)])
    for attention in ({"mask": part(window, width=4)}, {"score": slope}, {"score": part(Capped)}):
        for ctx in (Context(segments=padded), Context(positions=shuffled)):
            plain, tiled = _block(7, attention=attention)
            tiled.load_state_dict(plain.state_dict())
            _agree(plain.double(), tiled.double(), ctx)


@claim
def the_hidden_layer_is_never_whole():
    """At 1024 positions, width 64 and 8 tiles, the largest tensor is as large as the stream; the plain block's is 4
    times that.
    """
    for tile, largest in ((1024, 4), (128, 1)):
        block = Block(
            64,
            mixer=part(Attention, heads=1, mask=causal, kernel=part(flash_attention_2, tile=256)),
            mlp=part(MLP),
            residual=part(PreNorm, norm=LayerNorm),
            branches=part(tile_by_tile, tile=tile),
        )
        with _Largest() as seen:
            block(torch.randn(1, 1024, 64), Context()).sum().backward()
        assert seen.numbers == largest * 1024 * 64


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@claim.measured(paper="up to 4 times longer sequences than with memory-efficient attention alone (abstract, Table 1)")
def longer_in_the_same_memory(lab):
    """In the peak memory of 4 blocks with FlashAttention at 2048, 4096 and 8192 positions, BPT takes at least 2 times
    as many.

    BPT is measured to 16,384 positions. Its bytes are linear in length: the longest lengths are read off the fitted
    line. Four blocks and tiles of 256 were chosen after one block with tiles of 1024: its memory was that of gradients
    and tile.
    """
    import numpy as np

    times = {"flash": (2048, 4096, 8192), "bpt": (2048, 4096, 8192, 16_384)}
    bytes_ = {name: [_peak(lab, name, 4, time) for time in at] for name, at in times.items()}
    slope, start = np.polyfit(times["bpt"], bytes_["bpt"], 1)
    longest = [float((budget - start) / slope) for budget in bytes_["flash"]]
    numbers = {"positions": times, "bytes": bytes_, "longest": longest}
    ratios = [reached / time for time, reached in zip(times["flash"], longest, strict=True)]
    return lab.at_least(ratios, 2, unit="times as long", numbers=numbers, figures=_drawn(lab, times, bytes_, 4))


@claim.measured(paper="activations of a layer are linear in length, 2 b s h bytes (Table 1)")
def memory_grows_with_length(lab):
    """The exponent of a block's peak memory in length, to 32,768 positions, is at least 0.5 lower than the plain
    block's.
    """
    import numpy as np

    times = {"plain": (1024, 2048, 4096), "bpt": (2048, 8192, 32_768)}
    runs = [{name: [_peak(lab, name, 1, time) for time in at] for name, at in times.items()} for _ in range(2)]
    exponent = lambda run, name: float(np.polyfit(np.log(times[name]), np.log(run[name]), 1)[0])
    gaps = [exponent(run, "plain") - exponent(run, "bpt") for run in runs]
    numbers = {"positions": times, "bytes": runs, "exponents": [{n: exponent(r, n) for n in times} for r in runs]}
    return lab.at_least(gaps, 0.5, unit="in the exponent", numbers=numbers, figures=_drawn(lab, times, runs[0], 1))


def _peak(lab: Any, name: str, depth: int, time: int) -> int:
    return lab.peak_memory(_train_blocks, name, depth, time, warm=(name, depth, 300))


def _train_blocks(name: str, depth: int, time: int) -> None:
    kernel = part(attend) if name == "plain" else part(flash_attention_2, tile=256)
    block = part(
        Block,
        mixer=part(Attention, heads=1, mask=causal, kernel=kernel),
        mlp=part(MLP),
        residual=part(PreNorm, norm=LayerNorm),
        branches=part(tile_by_tile, tile=256) if name == "bpt" else part(in_turn),
    )
    Stack(128, depth=depth, block=block)(torch.randn(1, time, 128, requires_grad=True), Context()).sum().backward()


def _drawn(lab: Any, times: dict[str, Sequence[int]], bytes_: dict[str, list[int]], depth: int) -> dict[str, str]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, measured in bytes_.items():
        axes.loglog(times[name], [b / 2**20 for b in measured], marker="o", label=name)
    axes.set(xlabel="positions", ylabel="peak memory, MiB")
    axes.legend(frameon=False)
    return {f"Memory of a forward and backward pass, depth {depth}, width 128, one head, causal": lab.figure(figure)}
