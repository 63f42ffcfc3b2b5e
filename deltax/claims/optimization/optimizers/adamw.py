"""Claims of adamw: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.claims.optimization.optimizers.sgd import descend
from deltax.parts.training import optimizers

Moments = tuple[Tensor, Tensor]


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    moments: Moments | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Moments]:
    """One step, the `step`-th from 1 on, with decoupled decay (Algorithm 2). Any shape; returns (w, (mean, square)).

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- (1 - lr weight_decay) w - lr m' / (sqrt(v') + eps), with
    m' = m / (1 - b1^t) and v' likewise.
    """
    mean, square = moments or (torch.zeros_like(weight), torch.zeros_like(weight))
    (b1, b2), weight = betas, (1 - lr * weight_decay) * weight
    mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient.square()
    direction = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + eps)
    return weight - lr * direction, (mean, square)


@claim
def the_first_step_is_the_rate_along_the_signs():
    """Without decay the first step is lr * sign(g), whatever the gradient's size."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 31, dtype=torch.float64)
    for scale in (1e-1, 1.0, 1e3):
        moved, _ = adam_step(weight, scale * gradient, step=1, lr=0.01, weight_decay=0.0, eps=1e-12)
        torch.testing.assert_close(weight - moved, 0.01 * gradient.sign(), rtol=1e-6, atol=1e-9)


@claim
def the_size_of_the_loss_is_forgotten():
    """A loss a thousand times as large makes the same twenty steps, where SGD's are a thousand times as long."""
    torch.manual_seed(0)
    start, target = torch.randn(2, 13, dtype=torch.float64)
    ends = {}
    for scale in (1.0, 1000.0):
        ours, moments, plain = start, None, start
        for step in range(1, 21):
            ours, moments = adam_step(ours, scale * (ours - target), moments, step=step, lr=0.1, eps=0.0)
            plain, _ = descend(plain, scale * (plain - target), lr=1e-5)
        ends[scale] = ours, plain
    torch.testing.assert_close(ends[1.0][0], ends[1000.0][0], rtol=1e-12, atol=1e-12)
    assert (ends[1000.0][1] - start).norm() > 500 * (ends[1.0][1] - start).norm()


@claim
def decoupling_matters_under_adam_and_not_under_sgd():
    """In plain SGD, decay through the gradient is decoupled decay to rounding (Proposition 1 of the paper); under Adam
    it is not, and no multiple of it is: the decay of a coordinate shrinks as its gradients grow (Proposition 2).
    """
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 13, dtype=torch.float64)
    through, _ = descend(weight, gradient, lr=0.1, weight_decay=0.2)
    beside, _ = descend((1 - 0.1 * 0.2) * weight, gradient, lr=0.1)
    torch.testing.assert_close(through, beside, rtol=1e-12, atol=1e-12)

    weight = torch.ones(2, dtype=torch.float64)
    coordinates = {}
    for name in ("none", "through", "beside"):
        moved, moments = weight, None
        for step in range(1, 4):
            gradient = torch.tensor([1.0, 100.0], dtype=torch.float64) * (-1) ** step
            gradient = gradient + 0.1 * moved * (name == "through")
            weight_decay = 0.1 * (name == "beside")
            moved, moments = adam_step(moved, gradient, moments, step=step, lr=0.01, weight_decay=weight_decay)
        coordinates[name] = moved
    small, large = coordinates["none"] - coordinates["through"]
    assert small > 20 * large > 0
    small, large = coordinates["none"] - coordinates["beside"]
    assert math.isclose(small, large, rel_tol=0.05)


@claim.parity(peer="torch.optim.AdamW, torch.optim.Adam")
def equals_torch():
    """Twenty steps with random gradients of changing scale are those of torch's AdamW; with decay through the gradient
    instead, those of torch's Adam; and the recipe's optimizer makes AdamW's, with decay on matrices alone.
    """
    torch.manual_seed(0)
    start = torch.randn(5, 7, dtype=torch.float64)
    for peer, inside, beside in ((torch.optim.AdamW, 0.0, 0.3), (torch.optim.Adam, 0.3, 0.0)):
        theirs = nn.Parameter(start.clone())
        optimizer = peer([theirs], lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
        ours, moments = start, None
        for step in range(1, 21):
            gradient = torch.randn_like(start) * 10.0 ** (step % 3)
            theirs.grad = gradient
            optimizer.step()
            ours, moments = adam_step(
                ours,
                gradient + inside * ours,
                moments,
                step=step,
                lr=0.05,
                betas=(0.8, 0.9),
                eps=1e-3,
                weight_decay=beside,
            )
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)

    model = nn.Linear(7, 5).double()
    expected, moments = dict(model.state_dict()), {}
    expected = {name: value.clone() for name, value in expected.items()}
    optimizer = optimizers.adamw(model, lr=0.05, beta1=0.8, beta2=0.9, weight_decay=0.3)
    for step in range(1, 21):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            expected[name], moments[name] = adam_step(
                expected[name],
                parameter.grad,
                moments.get(name),
                step=step,
                lr=0.05,
                betas=(0.8, 0.9),
                weight_decay=0.3 if name == "weight" else 0.0,
            )
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-10)


@claim.measured(paper="LeNet of 1989 on its digits: 4.38 % test error with SGD, 3.59 % with AdamW (Karpathy's re-run)")
def better_than_sgd(lab):
    """Tuned alike, gpt under AdamW ends better than under SGD with momentum."""
    return lab.compare("gpt+sgd", "gpt").better
