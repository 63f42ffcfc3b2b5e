"""Proximal Policy Optimization Algorithms. Schulman, Wolski, Dhariwal, Radford, Klimov, 2017. arXiv:1707.06347

TRPO, but the bound on the KL divergence becomes a clip on the probability ratio: no constraint, no second derivatives.

The surrogate says what an action's advantage would be worth under the new policy; the clip takes away all reason to go
further from the old one than 1 +- clip. Being the smaller of two, it never takes away the reason to come back.
"""

import torch
from torch import Tensor

from deltax import paper


@paper(year=2017, arxiv="1707.06347")
def ppo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """The loss of each action, -min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = exp(log_probs - old) (Eq. 7).

    All tensors have one shape, or broadcast; `old` and `advantages` are not learnt from.
    """
    ratio = torch.exp(log_probs - old.detach())
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
