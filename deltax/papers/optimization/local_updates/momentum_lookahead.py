"""Momentum Look-Ahead for Asynchronous Distributed Low-Communication Training.
Ajanthan, Ramasinghe, Avraham, Dolatabadi, Koneputugodage, Shevchenko, Zuo, Long, 2025.

Asynchronous local SGD, but workers set out from a point extrapolated along the negative momentum, so that their
pseudo-gradients, stale when they arrive, were taken near where the others will have gone meanwhile.

The momentum is a moving average of pseudo-gradients, and the look-ahead its gamma-fold times the rate: Nesterov's idea
with the gradient's part undiminished. The server can keep the point looked ahead to, and then no worker knows of it.
The equations here are those that later work cites as the paper's; the paper itself was not at hand, and no code of its
authors was found.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltax import Part, paper, part
from deltax.papers.optimization.local_updates.async_local_sgd import alike, async_local_sgd
from deltax.papers.optimization.local_updates.async_nesterov_pp import async_nesterov_pp


class LookAhead(torch.optim.Optimizer):
    """m <- momentum m + (1 - momentum) g; w <- w - lr (g + momentum m), for weights that stand ahead already."""

    def __init__(self, weights: Sequence[Tensor], *, lr: float = 0.7, momentum: float = 0.9):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                p.add_(p.grad + momentum * average, alpha=-lr)


@paper(
    on=(async_local_sgd, async_nesterov_pp),
    replaces=async_local_sgd,
    url="https://openreview.net/forum?id=4O8nzTkHPI",
    year=2025,
    whole="gpt+async-local-sgd",
)
def momentum_lookahead(recipe: Part, *, lr: float = 0.7, momentum: float = 0.9) -> Part:
    return recipe.fill("outer", part(LookAhead, lr=lr, momentum=momentum)).fill("pace", alike)
