"""Layer Normalization. Ba, Kiros, Hinton, 2016. arXiv:1607.06450

Batch normalisation, but the statistics are taken over the features of one example.

Nothing is shared between examples, so training and use compute the same function, and a recurrence can be normalised
at every step. What is lost is the mean and the scale of each vector; a gain and a bias give them back, learned.
"""

import torch
from torch import Tensor, nn

from deltax import Part, paper
from deltax.papers.optimization.normalization.batch_norm import batch_norm
from deltax.parts.training.roles import tag
from deltax.shapes import Features


class LayerNorm(nn.Module):
    """gain * standardise(x) + bias (Eq. 4). Features (..., D) -> (..., D)."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gain = tag(nn.Parameter(torch.ones(dim)), "vector")
        self.bias = tag(nn.Parameter(torch.zeros(dim)), "vector")

    @property
    def weight(self) -> Tensor:
        """The gain, by the name that the neighbours of a torch norm read."""
        return self.gain

    def forward(self, x: Features) -> Features:
        return nn.functional.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)


@paper(on=batch_norm, year=2016, arxiv="1607.06450")
def layer_norm(recipe: Part, *, eps: float = 1e-5) -> Part:
    return recipe.fill("norm", LayerNorm, eps=eps)
