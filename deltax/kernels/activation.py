"""Activations whose backward pass keeps what the forward pass computed."""

import math
from typing import Any

import torch
from torch import Tensor

_A = 2 * math.sqrt(2 / math.pi)
_B = _A * 0.044715


class _GeluTanh(torch.autograd.Function):
    """x * sigmoid(A x + B x^3), the same function as 0.5 x (1 + tanh((A x + B x^3) / 2)), with the sigmoid kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        gate = torch.addcmul(x, x, square, value=_B / _A).mul_(_A).sigmoid_()
        ctx.save_for_backward(x, square, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, square, gate = ctx.saved_tensors
        inner = (square * (3 * _B)).add_(_A).mul_(x)
        slope = torch.addcmul(inner, inner, gate, value=-1).add_(1).mul_(gate)
        return slope.mul_(gradient)


def gelu_kept(x: Tensor) -> Tensor:
    """`gelu_tanh` for training on a CPU: one sigmoid in all, where torch computes a tanh in each direction."""
    return _GeluTanh.apply(x)
