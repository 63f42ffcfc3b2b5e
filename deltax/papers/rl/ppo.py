"""Proximal Policy Optimization Algorithms. Schulman, Wolski, Dhariwal, Radford, Klimov, 2017. arXiv:1707.06347

TRPO, but the bound on the KL divergence becomes a clip on the probability ratio: no constraint, no second derivatives.

The surrogate says what an action's advantage would be worth under the new policy; the clip takes away all reason to go
further from the old one than 1 +- clip. Being the smaller of two, it never takes away the reason to come back.
"""

import torch
from torch import Tensor

from deltax import claim, paper


@paper(year=2017, arxiv="1707.06347")
def ppo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """The loss of each action, -min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = exp(log_probs - old) (Eq. 7).

    All tensors have one shape, or broadcast; `old` and `advantages` are not learnt from.
    """
    ratio = torch.exp(log_probs - old.detach())
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@claim
def the_first_step_is_the_policy_gradient():
    """Where the policy is still the old one, the gradient is that of advantage-weighted log-likelihood."""
    torch.manual_seed(0)
    logits, advantages = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    log_probs = torch.log_softmax(logits, -1)[torch.arange(7), torch.randint(5, (7,))]
    ours = torch.autograd.grad(ppo(log_probs, log_probs, advantages).mean(), logits, retain_graph=True)[0]
    plain = torch.autograd.grad(-(advantages * log_probs).mean(), logits)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@claim
def the_clip_stops_going_and_not_coming_back():
    """An action has no gradient only where it is good and already likelier by the clip, or bad and already rarer by it;
    everywhere else its gradient is -r A."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64).repeat(2, 1)
    advantages = torch.tensor([[1.7], [-0.6]], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    gradient = torch.autograd.grad(ppo(log_probs, torch.zeros_like(ratio), advantages).sum(), log_probs)[0]
    stopped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    torch.testing.assert_close(gradient, torch.where(stopped, 0.0, -ratio * advantages), rtol=1e-12, atol=0)
    assert stopped.sum() == 4


@claim
def it_is_a_pessimistic_bound():
    """The clipped loss is nowhere below the unclipped one, and equal to it wherever the ratio is inside the clip."""
    torch.manual_seed(0)
    log_ratio, advantages = torch.randn(2, 999, dtype=torch.float64)
    zero = torch.zeros_like(log_ratio)
    clipped, free = (ppo(log_ratio, zero, advantages, clip=c) for c in (0.3, float("inf")))
    assert (clipped >= free).all()
    inside = (log_ratio.exp() - 1).abs() < 0.3
    assert torch.equal(clipped[inside], free[inside]) and (clipped > free).any()
    torch.testing.assert_close(free, -log_ratio.exp() * advantages)
