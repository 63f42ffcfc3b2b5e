"""Root Mean Square Layer Normalization. Zhang, Sennrich, 2019. arXiv:1910.07467

Layer normalisation, but nothing is subtracted: the vector is only divided by its root mean square.

If re-scaling is what helps and re-centring is not, the mean, its pass over the data and the bias can all go.
"""

import torch
from torch import Tensor, nn

from deltax import Part, paper
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.training.roles import tag
from deltax.shapes import Features


class RMSNorm(nn.Module):
    """gain * x / sqrt(mean(x^2) + eps) (Eq. 4). Features (..., D) -> (..., D)."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gain = tag(nn.Parameter(torch.ones(dim)), "vector")

    @property
    def weight(self) -> Tensor:
        """The gain, by the name that the neighbours of a torch norm read."""
        return self.gain

    def forward(self, x: Features) -> Features:
        return nn.functional.rms_norm(x, self.gain.shape, self.gain, self.eps)


@paper(on=LayerNorm, year=2019, arxiv="1910.07467")
def rms_norm(recipe: Part, *, eps: float = 1e-5) -> Part:
    return recipe.fill("norm", RMSNorm, eps=eps)
