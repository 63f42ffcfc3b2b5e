"""Root Mean Square Layer Normalization. Zhang, Sennrich, 2019. arXiv:1910.07467

Layer normalisation, but the mean is not subtracted: the vector is only divided by its root mean square.

The paper finds that re-scaling helps and re-centring does not. The mean, its pass over the data and the bias go.
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
        """The gain, under the name that torch's norms have."""
        return self.gain

    def forward(self, x: Features) -> Features:
        # eps is inside the root; torch takes the statistics of 16-bit inputs in float32
        return nn.functional.rms_norm(x, self.gain.shape, self.gain, self.eps)


@paper(on=LayerNorm, year=2019, arxiv="1910.07467")
def rms_norm(recipe: Part, *, eps: float = 1e-5) -> Part:
    return recipe.fill("norm", RMSNorm, eps=eps)
