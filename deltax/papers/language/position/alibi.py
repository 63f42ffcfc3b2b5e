"""Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation.
Press, Smith, Lewis, 2021. arXiv:2108.12409

A transformer, but a penalty on the attention logits, linear in distance, replaces the position embeddings.

A learned position embedding exists only for the positions seen in training. The penalty is defined for every distance,
so a model trained on short sequences can be evaluated on longer ones.
"""

import math

import torch
from torch import Tensor, nn

from deltax import Part, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.nothing import Nothing
from deltax.shapes import Scores


def slopes(heads: int) -> Tensor:
    """2^(-8/H), 2^(-16/H), ... 2^-8 (section 3), one for each of H heads.

    For other H than powers of two: the slopes for the power below, then every second slope for the power above, as
    released.
    """
    # the largest power of two that is at most H
    below = 2 ** math.floor(math.log2(heads))
    geometric = lambda n: 2.0 ** (-8 / n * torch.arange(1, n + 1, dtype=torch.float64))
    return torch.cat([geometric(below), geometric(2 * below)[::2][: heads - below]])


class Distance(nn.Module):
    """score - strength * slope_h * |q - k|, with FlexAttention's signature of a score function."""

    additive = True

    def __init__(self, heads: int, *, strength: float = 1.0):
        super().__init__()
        # the slopes are constants: not trained, and not in the state dict
        self.register_buffer("slope", strength * slopes(heads).float(), persistent=False)

    def forward(self, scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        # the paper is causal and has i - j; |i - j| serves encoders too
        return scores - (self.slope[h] * (q - k).abs()).to(scores.dtype)


@paper(on=gpt, arxiv="2108.12409", year=2021)
def alibi(recipe: Part, *, strength: float = 1.0) -> Part:
    # nothing is added to the embeddings
    return recipe.fill("position", Nothing).fill("score", Distance, strength=strength)
