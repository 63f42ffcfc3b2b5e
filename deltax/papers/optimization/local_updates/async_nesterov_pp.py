"""Nesterov Method for Asynchronous Pipeline Parallel Optimization.
Ajanthan, Ramasinghe, Zuo, Avraham, Long, 2025. arXiv:2505.01099

An asynchronous pipeline, but its stale gradients are answered by a long look-ahead: Nesterov's momentum of 0.99, the
gradient discounted by one minus that.

Without bubbles, stage s of P learns from gradients that are P - 1 - s updates late. The look-ahead points where the
weights have drifted meanwhile, the more so the larger the momentum; the discount keeps late gradients from shaking it.
In practice that is NAdam with beta1 = 0.99 and decoupled decay, as in the released code. The pipeline's delays are
simulated by `deltax.parts.training.stale`: PipeDream's stashed weights, in one process.
"""

import torch
from torch import nn

from deltax import Part, paper
from deltax.papers.optimization.optimizers.adamw import adamw
from deltax.papers.optimization.optimizers.nesterov import nesterov
from deltax.papers.systems.parallelism.pipedream import pipedream
from deltax.parts.numerics.counts import at_least, below
from deltax.parts.training.delayed_gradients import DelayedGradients
from deltax.parts.training.roles import by_role


def nadam(
    model: nn.Module, *, lr: float = 3e-3, beta1: float = 0.99, beta2: float = 0.999, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """torch's NAdam with decoupled decay, on matrices only."""
    at_least(0, lr=lr, weight_decay=weight_decay)
    below(0, 1, beta1=beta1, beta2=beta2)
    roles = by_role(model)
    groups = [
        {"params": p, "weight_decay": weight_decay if role == "matrix" else 0.0} for role, p in roles.items() if p
    ]
    return torch.optim.NAdam(groups, lr=lr, betas=(beta1, beta2), decoupled_weight_decay=True)


@paper(on=(pipedream, nesterov, adamw), arxiv="2505.01099", year=2025)
def async_nesterov_pp(recipe: Part, *, stages: int = 4, momentum: float = 0.99) -> Part:
    return recipe.fill("optimizer", nadam, beta1=momentum, beta2=0.999).wrap(
        "optimizer", DelayedGradients, stages=stages
    )
