"""The feed-forward branch for training on a CPU."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.kernels.projections import is_linear
from deltax.kernels.twins import twin
from deltax.parts.attention.scratch import is_plain_training, scratch
from deltax.parts.model.mlp import MLP, gelu_tanh
from deltax.recipe import Part
from deltax.shapes import Stream

# gelu_tanh(x) = x sigmoid(OUTER (x + INNER x^3)): the same function as 0.5 x (1 + tanh(OUTER (x + INNER x^3) / 2)).
OUTER, INNER = 2 * math.sqrt(2 / math.pi), 0.044715
_OUTER_TENSOR = torch.tensor(OUTER, dtype=torch.float64, device="cpu")  # addcmul takes no number


@twin("parts.mlp:MLP", on="cpu", why="the derivative of GELU is computed in the forward pass")
class SavedGeluDerivative(MLP):
    """`MLP`, with the same parameters, whose forward pass also makes GELU's slope, so that the way back is products.

    It does where both maps are plain and biased; a hook on one, or a part in its place, goes the way of `MLP`.
    """

    def forward(self, x: Stream) -> Stream:
        maps = (self.up, self.down)
        gelu = isinstance(self.activation, Part) and self.activation.target is gelu_tanh
        if not (gelu and all(is_linear(m) and m.bias is not None for m in maps)):
            return super().forward(x)
        given = (x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return _UpGeluDown.apply(*given) if is_plain_training(*given) else super().forward(x)


class _UpGeluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        shape = (len(rows), len(up))
        active, slope = x.new_empty(shape), x.new_empty(shape)
        hidden = torch.addmm(up_bias, rows, up.T, out=scratch("hidden", shape, x))
        ratio = torch.addcmul(_OUTER_TENSOR, hidden, hidden, value=OUTER * INNER, out=active)
        bent = torch.mul(hidden, ratio, out=slope)  # OUTER (h + INNER h^3)
        rise = torch.sub(bent, hidden, alpha=OUTER * 2 / 3, out=scratch("rise", shape, x))  # a third of h d bent / dh
        gate = bent.sigmoid_()
        torch.mul(hidden, gate, out=active)
        gate.add_(torch.ops.aten.sigmoid_backward.grad_input(rise, gate, grad_input=rise), alpha=3)
        ctx.save_for_backward(x, up, down, active, slope)
        return torch.addmm(down_bias, active, down.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, active, slope = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        d_hidden = torch.mm(gradient, down, out=scratch("hidden", slope.shape, x)).mul_(slope)
        return (
            (d_hidden @ up).view_as(x) if wanted[0] else None,
            d_hidden.T @ rows if wanted[1] else None,
            d_hidden.sum(0) if wanted[2] else None,
            gradient.T @ active if wanted[3] else None,
            gradient.sum(0) if wanted[4] else None,
        )
