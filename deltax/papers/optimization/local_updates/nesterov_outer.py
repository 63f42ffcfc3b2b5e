"""DiLoCo: Distributed Low-Communication Training of Language Models (its outer optimizer).
Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen, 2023. arXiv:2311.08105

Local SGD, but the mean of what the workers moved is not applied as it is: it is the gradient that Nesterov's momentum
follows, round after round.

Averaging forgets, at every meeting, which way the rounds before it went. The paper tries SGD (which is averaging), SGD
with momentum, Adam (which needs an eps of 0.1) and Nesterov's momentum, and finds the last to be best, at rate 0.7 and
momentum 0.9.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.optimization.local_updates.local_sgd import local_sgd
from deltax.papers.optimization.optimizers.nesterov import nesterov


def outer_nesterov(weights: Sequence[Tensor], *, lr: float = 0.7, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Nesterov's momentum along pseudo-gradients."""
    return torch.optim.SGD(weights, lr=lr, momentum=momentum, nesterov=momentum > 0)


def outer_momentum(weights: Sequence[Tensor], *, lr: float = 0.3, momentum: float = 0.9) -> torch.optim.Optimizer:
    """The heavy ball along pseudo-gradients."""
    return torch.optim.SGD(weights, lr=lr, momentum=momentum)


def outer_adam(
    weights: Sequence[Tensor], *, lr: float = 0.3, beta1: float = 0.9, beta2: float = 0.95, eps: float = 0.1
) -> torch.optim.Optimizer:
    """Adam along pseudo-gradients: FedOpt (arXiv:2003.00295)."""
    return torch.optim.Adam(weights, lr=lr, betas=(beta1, beta2), eps=eps)


@paper(on=(local_sgd, nesterov), arxiv="2311.08105", year=2023, whole="gpt+local-sgd")
def nesterov_outer(recipe: Part, *, lr: float = 0.7, momentum: float = 0.9) -> Part:
    return recipe.fill("outer", outer_nesterov, lr=lr, momentum=momentum)
