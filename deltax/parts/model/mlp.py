"""The position-wise feed-forward branch."""

import torch
from torch import Tensor, nn

from deltax.parts.model.linear import Linear, OutProj
from deltax.parts.numerics.counts import above
from deltax.recipe import Part, part
from deltax.shapes import Stream


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 computes it."""
    return nn.functional.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """x times the chance that a standard normal is below x, elementwise (arXiv:1606.08415)."""
    return nn.functional.gelu(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return torch.relu(x)


class MLP(nn.Module):
    """down(activation(up(x))), `widen` times as wide inside. Stream (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        dim: int,
        *,
        widen: float = 4,
        up: Part = part(Linear),
        activation: Part = part(gelu_tanh),
        down: Part = part(OutProj),
    ):
        super().__init__()
        above(0, widen=widen)
        hidden = int(widen * dim)
        self.up = up(dim, hidden)
        self.activation = activation
        self.down = down(hidden, dim)

    def forward(self, x: Stream) -> Stream:
        return self.down(self.activation(self.up(x)))
