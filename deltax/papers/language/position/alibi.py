"""Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation.
Press, Smith, Lewis, 2021. arXiv:2108.12409

A transformer, but distance is a penalty on the score, not a vector on the input.

A position vector seen for 1024 tokens says nothing about token 1025. A penalty that grows with distance says the same
thing at every length, and costs one addition.
"""

import math

import torch
from torch import Tensor, nn

from deltax import Part, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.nothing import Nothing
from deltax.shapes import Scores


def slopes(heads: int) -> Tensor:
    """2^(-8/H), 2^(-16/H), ... 2^-8 (section 3): some heads near-sighted, some not.

    Where H is no power of two: those of the power below, then every second one of the power above, as released.
    """
    below = 2 ** math.floor(math.log2(heads))
    geometric = lambda n: 2.0 ** (-8 / n * torch.arange(1, n + 1, dtype=torch.float64))
    return torch.cat([geometric(below), geometric(2 * below)[::2][: heads - below]])


class Distance(nn.Module):
    """score - strength * slope_h * |q - k|, in FlexAttention's terms."""

    additive = True

    def __init__(self, heads: int, *, strength: float = 1.0):
        super().__init__()
        self.register_buffer("slope", strength * slopes(heads).float(), persistent=False)

    def forward(self, scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        return scores - (self.slope[h] * (q - k).abs()).to(scores.dtype)


@paper(on=gpt, arxiv="2108.12409", year=2021)
def alibi(recipe: Part, *, strength: float = 1.0) -> Part:
    return recipe.fill("position", Nothing).fill("score", Distance, strength=strength)
