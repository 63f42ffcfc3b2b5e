"""GLU Variants Improve Transformer. Shazeer, 2020. arXiv:2002.05202

A transformer, but a second projection through Swish gates every hidden unit of the feed-forward branch.

The two projections are multiplied, so the branch is quadratic in its input. It has three matrices instead of two; the
hidden width is 2/3 of the ungated one, so the number of parameters is equal. No biases. With a sigmoid in place of
Swish the branch is GLU (Dauphin et al., 2016), with GELU GEGLU, with ReLU ReGLU, with the identity the bilinear form.
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

    As many weights as an `MLP` of hidden width widen * D: the hidden width here is 2/3 of that, rounded.
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
        # 3 D h = 2 D (widen D) at h = 2/3 widen D; Llama also rounds h up to a multiple of 256
        hidden = round(2 * widen * dim / 3)
        self.gate, self.up = gate(dim, hidden), up(dim, hidden)
        self.activation = activation
        self.down = down(hidden, dim)

    def forward(self, x: Stream) -> Stream:
        # (B, T, D) -> (B, T, h) -> (B, T, D)
        return self.down(self.activation(self.gate(x)) * self.up(x))


@paper(on=transformer, year=2020, arxiv="2002.05202")
def swiglu(recipe: Part) -> Part:
    return recipe.fill("mlp", SwiGLU)
