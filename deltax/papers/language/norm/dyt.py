"""Transformers without Normalization. Zhu, Chen, He, LeCun, Liu, 2025. arXiv:2503.10622

A transformer, but every norm is an elementwise tanh.

Plot what a trained LayerNorm gives against what it was given and you see an S. DyT draws the S itself: one learned
slope for the layer, a gain and a bias for each feature, and no statistics, so no feature waits for another. A tanh,
unlike a norm, is not blind to scale: the stream has to start at order one, so in a language model a learned scalar
lifts what the embedding gives (section 5; `shared_scale` in the released code).

Slopes start at 0.5 everywhere but in large language models, where the paper starts them lower the wider the model, and
higher before attention than before the feed-forward branch and at the end: 0.8 and 0.2 for LLaMA 7B (width 4096), 0.6
and 0.15 for 13B (5120), 0.2 and 0.05 for 34B and 70B (8192). That is `dyt(alpha=0.2, attention=0.8)`, and `final` for
the last norm alone. There DyT stands in for RMSNorm, and has a bias all the same in the released code, as here.
"""

import math

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.training.roles import tag
from deltax.shapes import Features, Stream


class DyT(nn.Module):
    """gain * tanh(alpha * x) + bias, elementwise (Eq. 1). Features (..., D) -> (..., D)."""

    def __init__(self, dim: int, *, alpha: float = 0.5):
        super().__init__()
        self.alpha = tag(nn.Parameter(torch.tensor(alpha)), "gate")
        self.gain = tag(nn.Parameter(torch.ones(dim)), "vector")
        self.bias = tag(nn.Parameter(torch.zeros(dim)), "vector")

    @property
    def weight(self) -> Tensor:
        """The gain, by the name that the neighbours of a torch norm read."""
        return self.gain

    def forward(self, x: Features) -> Features:
        return self.gain * torch.tanh(self.alpha * x) + self.bias


class Lift(nn.Module):
    """scale * x, with one learned scalar that starts at sqrt(D) (section 5). Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = tag(nn.Parameter(torch.tensor(math.sqrt(dim))), "gate")

    def forward(self, x: Stream) -> Stream:
        return self.scale * x


def sloped(dim: int, *, inner: Part, alpha: float) -> nn.Module:
    """The inner block, but the DyT of its first branch starts at `alpha`. Raises UserError where there is none."""
    block = inner(dim)
    found = [m for m in getattr(block, "mixer_residual", nn.Identity()).modules() if isinstance(m, DyT)]
    if not found:
        raise UserError(
            f"{type(block).__name__} has no DyT before its attention to start at {alpha}; leave `attention` out"
        )
    for norm in found:
        nn.init.constant_(norm.alpha, alpha)
    return block


@paper(on=gpt, arxiv="2503.10622", year=2025)
def dyt(recipe: Part, *, alpha: float = 0.5, attention: float | None = None, final: float | None = None) -> Part:
    """Slopes start at `alpha`, but at `attention` before attention and at `final` after the last block, where given."""
    recipe = recipe.fill("norm", DyT, alpha=alpha)
    if attention is not None:
        recipe = recipe.wrap("block", sloped, alpha=attention)
    if final is not None:
        recipe = recipe.put("model.norm.alpha", final)
    return recipe.fill("entry", Lift) if "embedding" in recipe.slots() else recipe
