"""Transformers without Normalization. Zhu, Chen, He, LeCun, Liu, 2025. arXiv:2503.10622

A transformer, but every norm is an elementwise tanh.

The outputs of a trained LayerNorm, plotted against its inputs, form an S-curve. DyT computes such a curve directly: one
learned slope for the layer, a gain and a bias for each feature, and no statistics, so features do not depend on each
other. Unlike a norm, tanh is not scale invariant: the hidden states have to start at order one. In a language model
a learned scalar therefore multiplies the embedding (section 5; `shared_scale` in the released code).

Slopes start at 0.5, except in large language models. There the paper starts them lower for wider models, and higher
before attention than elsewhere: 0.8 and 0.2 for LLaMA 7B (width 4096), 0.6 and 0.15 for 13B (5120), 0.2 and 0.05 for
34B and 70B (8192). For 7B that is `dyt(alpha=0.2, attention=0.8)`; `final` sets the last norm alone. DyT replaces
RMSNorm there and keeps its bias in the released code, as here.
"""

import math

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.normalization.layer_norm import layer_norm
from deltax.papers.vision.backbones.vit import vit
from deltax.parts.training.roles import tag
from deltax.shapes import Features, Stream


class DyT(nn.Module):
    """gain * tanh(alpha * x) + bias, elementwise (Eq. 1). Features (..., D) -> (..., D)."""

    def __init__(self, dim: int, *, alpha: float = 0.5):
        super().__init__()
        self.alpha = tag(nn.Parameter(torch.tensor(alpha)), "gate")  # one scalar for all features
        self.gain = tag(nn.Parameter(torch.ones(dim)), "vector")
        self.bias = tag(nn.Parameter(torch.zeros(dim)), "vector")

    @property
    def weight(self) -> Tensor:
        """The gain, under the name that torch's norms have."""
        return self.gain

    def forward(self, x: Features) -> Features:
        # Eq. 1: DyT(x) = gamma tanh(alpha x) + beta
        return self.gain * torch.tanh(self.alpha * x) + self.bias


@paper(on=(gpt, layer_norm, vit), arxiv="2503.10622", year=2025)
def dyt(recipe: Part, *, alpha: float = 0.5, attention: float | None = None, final: float | None = None) -> Part:
    """Slopes start at `alpha`; `attention` sets those before attention, `final` the one after the last block."""
    recipe = recipe.fill("norm", DyT, alpha=alpha)
    if attention is not None:
        recipe = recipe.wrap("block", sloped, alpha=attention)
    if final is not None:
        recipe = recipe.put("model.norm.alpha", final)
    # images enter through a patch projection and need no scale
    return recipe.fill("entry", Lift) if "embedding" in recipe.slots() else recipe


class Lift(nn.Module):
    """scale * x, with one learned scalar that starts at sqrt(D) (section 5). Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int):
        super().__init__()
        # embeddings start at a standard deviation of 0.02, where tanh is nearly linear
        self.scale = tag(nn.Parameter(torch.tensor(math.sqrt(dim))), "gate")

    def forward(self, x: Stream) -> Stream:
        return self.scale * x


def sloped(dim: int, *, inner: Part, alpha: float) -> nn.Module:
    """The inner block with the slope of its mixer's DyT at `alpha`. Raises UserError for a block without one."""
    block = inner(dim)
    found = [m for m in getattr(block, "mixer_residual", nn.Identity()).modules() if isinstance(m, DyT)]
    if not found:
        raise UserError(f"{type(block).__name__} has no DyT before its attention: leave out attention={alpha}")
    for norm in found:
        nn.init.constant_(norm.alpha, alpha)
    return block
