"""Linear maps. A part that wants another start or no bias fills its slot with another of these."""

import math

import torch
from torch import nn

from deltax.parts.training.roles import tag


def init_std(width: int) -> float:
    """The deviation of GPT-2's weights at any width: their 0.02 belongs to width 768, and goes as 1/sqrt(width)."""
    return 0.02 * math.sqrt(768 / width)


class Linear(nn.Linear):
    """x W' + b with W ~ N(0, std), `init_std(dim)` by default, and b = 0. (..., D) -> (..., F)."""

    def __init__(self, dim: int, out: int, *, std: float | None = None):
        self.std = init_std(dim) if std is None else std
        super().__init__(dim, out)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class XavierLinear(Linear):
    """A `Linear` with W uniform of variance 2 / (D + F) (Glorot & Bengio, 2010, Eq. 16)."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class OutProj(Linear):
    """A `Linear` that writes to the residual stream; a `Stack` makes its start smaller by sqrt(2 depth)."""


class LinearNoBias(Linear):
    """A `Linear` without bias."""

    def __init__(self, dim: int, out: int, *, std: float | None = None):
        super().__init__(dim, out, std=std)
        self.register_parameter("bias", None)


class OutProjNoBias(OutProj, LinearNoBias):
    """An `OutProj` without bias."""


@torch.no_grad()
def depth_scaled_init(module: nn.Module, depth: int) -> None:
    """Scale every `OutProj` inside by 1/sqrt(2 depth): so many branches are summed (GPT-2, section 2.3)."""
    for inner in module.modules():
        if isinstance(inner, OutProj):
            inner.weight.mul_((2 * depth) ** -0.5)
