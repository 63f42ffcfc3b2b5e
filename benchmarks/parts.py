"""Each part, forward and backward, against the peer that a user would pick, at equal shape."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import timing
from deltax import kernels, part
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.language.feedforward.swiglu import SwiGLU
from deltax.papers.language.norm.dyt import DyT
from deltax.papers.language.norm.rms_norm import RMSNorm
from deltax.papers.language.position.rope import Rotary
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal
from deltax.parts.model.mlp import MLP
from deltax.recipe import Part

B, T, D, HEADS = 8, 256, 128, 4


def main() -> None:
    import x_transformers.x_transformers as peers
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    fast = lambda tree: kernels.fastest(tree, torch.device("cpu"))
    swiglu = fast(part(SwiGLU))(D)
    width = swiglu.up.out_features
    llama = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=width))
    attention = lambda **slots: _with_context(fast(part(Attention, heads=HEADS, mask=causal, **slots)))
    theirs = lambda **options: peers.Attention(D, heads=HEADS, dim_head=D // HEADS, causal=True, **options)
    rotary = peers.RotaryEmbedding(D // HEADS)
    turned = theirs(flash=True)
    flash = theirs(flash=True)
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "LayerNorm against torch.nn.LayerNorm": (LayerNorm(D), nn.LayerNorm(D)),
        "RMSNorm against torch.nn.RMSNorm": (RMSNorm(D), nn.RMSNorm(D)),
        "DyT against x-transformers DynamicTanh": (DyT(D), peers.DynamicTanh(D)),
        "MLP against x-transformers FeedForward": (fast(part(MLP))(D), peers.FeedForward(D)),
        "SwiGLU against transformers LlamaMLP": (swiglu, llama),
        "attention against x-transformers Attention, flash": (attention(), flash),
        "attention with RoPE against x-transformers Attention, flash": (
            attention(qk_position=Rotary),
            lambda x: turned(x, rotary_pos_emb=rotary.forward_from_seq_len(T)),
        ),
    }
    rows = {}
    for name, (ours, peer) in pairs.items():
        seconds = timing.interleave({"ours": _both_ways(ours), "peer": _both_ways(peer)}, rounds=31, warmup=5)
        rows[name] = timing.ratio(seconds["ours"], seconds["peer"])
    timing.store("parts", rows)


def _with_context(tree: Part) -> Callable[[Tensor], Tensor]:
    module, ctx = tree(D), Context()
    return lambda x: module(x, ctx)


def _both_ways(part: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    x, gradient = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)

    def step() -> None:
        for _ in range(3):
            part(x).backward(gradient)

    return step
