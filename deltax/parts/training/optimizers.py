"""Optimizers that torch ships, handed each parameter's role, and the base of those that wrap another."""

from typing import Any

import torch
from torch import nn

from deltax.parts.numerics.counts import at_least, below
from deltax.parts.training.roles import by_role


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another. Its parameter groups are those of `inner`: one list, so no copy takes a rate.

    inner  the optimizer that takes the steps
    """

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups


def adamw(
    model: nn.Module, *, lr: float = 3e-3, beta1: float = 0.9, beta2: float = 0.95, weight_decay: float = 0.1
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), fused, with decay on matrices only."""
    at_least(0, lr=lr, weight_decay=weight_decay)
    below(0, 1, beta1=beta1, beta2=beta2)
    roles = by_role(model)
    groups = [
        {"params": p, "weight_decay": weight_decay if role == "matrix" else 0.0} for role, p in roles.items() if p
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)


def sgd(model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    at_least(0, lr=lr)
    below(0, 1, momentum=momentum)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def nesterov(model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov's momentum."""
    at_least(0, lr=lr)
    below(0, 1, momentum=momentum)
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(weights, lr=lr, momentum=momentum, nesterov=True)
