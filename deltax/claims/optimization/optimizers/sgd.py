"""Claims of sgd: the paper's equations, parity with peers, and what it measures."""

import itertools

import torch
from torch import Tensor, nn

from deltax import claim


def descend(
    weight: Tensor,
    gradient: Tensor,
    velocity: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step: v <- momentum v + (1 - dampening) (g + weight_decay w); w <- w - lr v. Any shape; returns (w, v).

    The first velocity, of None, is the gradient itself, undampened, as in torch.
    """
    gradient = gradient + weight_decay * weight
    velocity = gradient if velocity is None else momentum * velocity + (1 - dampening) * gradient
    return weight - lr * velocity, velocity


@claim
def rates_that_fall_as_one_over_t_average():
    """On squared distances to samples, with rate 1/t, the iterate after t steps is the mean of the t samples: the
    noise falls as in the best of estimates, while a constant rate keeps a share of it for ever.
    """
    torch.manual_seed(0)
    samples = torch.randn(101, 5, dtype=torch.float64)
    falling = constant = torch.randn(5, dtype=torch.float64)
    for t, sample in enumerate(samples, start=1):
        falling, _ = descend(falling, falling - sample, lr=1 / t)
        constant, _ = descend(constant, constant - sample, lr=0.5)
    torch.testing.assert_close(falling, samples.mean(0), rtol=1e-12, atol=1e-12)
    assert (constant - samples.mean(0)).norm() > 0.1


@claim
def a_velocity_is_a_longer_step_along_what_persists():
    """Along a constant gradient the velocity grows to 1 / (1 - momentum) gradients, and no further."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 7, dtype=torch.float64)
    velocity = None
    for step in range(1, 60):
        weight, velocity = descend(weight, gradient, velocity, lr=0.1, momentum=0.8)
        torch.testing.assert_close(velocity, gradient * (1 - 0.8**step) / (1 - 0.8), rtol=1e-12, atol=1e-12)


@claim.parity(peer="torch.optim.SGD")
def equals_torch():
    """Fifty steps on a quadratic are those of torch.optim.SGD to 1e-12, with every combination of momentum, dampening,
    decay and a sign turned round to climb.
    """
    torch.manual_seed(0)
    root, start = torch.randn(7, 7, dtype=torch.float64) / 3, torch.randn(7, dtype=torch.float64)
    for momentum, dampening, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True)
    ):
        if dampening and not momentum:
            continue
        theirs = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD(
            [theirs], lr=0.05, momentum=momentum, dampening=dampening, weight_decay=weight_decay, maximize=maximize
        )
        ours, velocity, sign = start, None, -1 if maximize else 1
        for _ in range(50):
            theirs.grad = root.T @ (root @ theirs.detach())
            optimizer.step()
            ours, velocity = descend(
                ours,
                sign * root.T @ (root @ ours),
                velocity,
                lr=0.05,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
            )
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
        assert (ours - start).norm() > 0.1
