"""GLU Variants Improve Transformer. Shazeer, 2020. arXiv:2002.05202

A transformer, but a second projection, through a Swish, gates every hidden unit of the feed-forward branch.

The gate multiplies what it gates, so the branch is quadratic where a relu is linear. Three matrices in place of two,
so the hidden width is two thirds of the ungated one and the parameters stay equal. No biases. With a sigmoid for the
Swish it is the GLU of Dauphin and others (2016), with a GELU GEGLU, with a relu ReGLU, with nothing the bilinear
form.
"""

import torch
from torch import nn

from deltax import Part, paper, part
from deltax.papers.language.models.transformer import transformer
from deltax.parts.model.linear import Matrix, OutMatrix
from deltax.parts.numerics.counts import above
from deltax.shapes import Stream


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), the Swish with beta = 1."""
    return nn.functional.silu(x)


class SwiGLU(nn.Module):
    """down(activation(gate(x)) * up(x)) (Eq. 6). Stream (B, T, D) -> (B, T, D).

    As many weights as an `MLP` that is `widen` times as wide inside: the hidden width is 2/3 of widen * D, rounded.
    """

    def __init__(
        self,
        dim: int,
        *,
        widen: float = 4,
        gate: Part = part(Matrix),
        activation: Part = part(silu),
        up: Part = part(Matrix),
        down: Part = part(OutMatrix),
    ):
        super().__init__()
        above(0, widen=widen)
        hidden = round(2 * widen * dim / 3)
        self.gate, self.up = gate(dim, hidden), up(dim, hidden)
        self.activation = activation
        self.down = down(hidden, dim)

    def forward(self, x: Stream) -> Stream:
        return self.down(self.activation(self.gate(x)) * self.up(x))


@paper(on=transformer, year=2020, arxiv="2002.05202")
def swiglu(recipe: Part) -> Part:
    return recipe.fill("mlp", SwiGLU)
