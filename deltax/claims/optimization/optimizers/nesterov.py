"""Claims of nesterov: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.claims.optimization.optimizers.sgd import descend
from deltax.parts.training import optimizers


def look_ahead(
    weight: Tensor, before: Tensor, gradient: Callable[[Tensor], Tensor], *, lr: float, momentum: float
) -> Tensor:
    """w + d - lr gradient(w + d), with d = momentum (w - before): the weights after this step. Any shape."""
    ahead = weight + momentum * (weight - before)
    return ahead - lr * gradient(ahead)


def descend_ahead(
    weight: Tensor, gradient: Tensor, velocity: Tensor | None = None, *, lr: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """The same step for weights that stand ahead already: v <- momentum v + g; w <- w - lr (g + momentum v)."""
    velocity = gradient if velocity is None else momentum * velocity + gradient
    return weight - lr * (gradient + momentum * velocity), velocity


@claim
def two_ways_to_write_one_sequence():
    """The weights that torch keeps are the look-ahead form's w + momentum (w - before), step for step, on any function
    that can be differentiated, as long as rate and momentum stay what they are.
    """
    torch.manual_seed(0)
    root = torch.randn(7, 7, dtype=torch.float64) / 3
    gradient = torch.func.grad(lambda w: (root @ w).square().sum() / 2 + w.cos().sum())
    before = weight = theirs = torch.randn(7, dtype=torch.float64)
    velocity = None
    for _ in range(40):
        before, weight = weight, look_ahead(weight, before, gradient, lr=0.05, momentum=0.9)
        theirs, velocity = descend_ahead(theirs, gradient(theirs), velocity, lr=0.05, momentum=0.9)
        torch.testing.assert_close(theirs, weight + 0.9 * (weight - before), rtol=1e-10, atol=1e-10)


@claim
def no_look_ahead_is_sgd():
    """Without momentum it is SGD, to the bit."""
    torch.manual_seed(0)
    weight, gradient, velocity = torch.randn(3, 7, dtype=torch.float64)
    ours, _ = descend_ahead(weight, gradient, velocity, lr=0.1, momentum=0.0)
    theirs, _ = descend(weight, gradient, velocity, lr=0.1)
    assert torch.equal(ours, theirs)


@claim
def the_root_of_the_condition_is_what_counts():
    """On a quadratic of condition 1,000, plain descent takes over five times the steps that Nesterov's takes to come a
    million times closer; with a quarter of the condition it takes a quarter as many, Nesterov's half.
    """
    taken = {}
    for condition in (250, 1000):
        curvature = torch.logspace(0, torch.tensor(condition).log10().item(), 9, dtype=torch.float64) / condition
        momentum = (condition**0.5 - 1) / (condition**0.5 + 1)
        for name, mu in (("plain", 0.0), ("nesterov", momentum)):
            before = weight = torch.ones(9, dtype=torch.float64)
            steps = 0
            while weight.norm() > 3e-6:  # from 3
                after = look_ahead(weight, before, lambda w, c=curvature: c * w, lr=1.0, momentum=mu)
                before, weight, steps = weight, after, steps + 1
            taken[name, condition] = steps
    assert taken["plain", 1000] > 5 * taken["nesterov", 1000]
    assert 3.5 < taken["plain", 1000] / taken["plain", 250] < 4.5
    assert 1.7 < taken["nesterov", 1000] / taken["nesterov", 250] < 2.3


@claim
def one_over_k_squared():
    """With momentum (k - 1) / (k + 2) and rate 1/L the error after k steps is at most 2 L r^2 / (k + 1)^2, r being the
    distance at the start, on the chain that is hard for all first-order methods, where plain descent breaks the bound.
    """
    size = 201
    chain = 2 * torch.eye(size, dtype=torch.float64)
    chain -= torch.diag(torch.ones(size - 1, dtype=torch.float64), 1) + torch.diag(
        torch.ones(size - 1, dtype=torch.float64), -1
    )
    best = torch.linalg.solve(chain, torch.eye(size, dtype=torch.float64)[0])
    error = lambda w: ((w - best) @ chain @ (w - best) / 2).item()
    broken = {"plain": 0, "nesterov": 0}
    for name in broken:
        before = weight = torch.zeros(size, dtype=torch.float64)
        for k in range(1, 300):
            mu = (k - 1) / (k + 2) if name == "nesterov" else 0.0
            after = look_ahead(weight, before, lambda w: chain @ (w - best), lr=1 / 4, momentum=mu)
            before, weight = weight, after
            broken[name] += error(weight) > 2 * 4 * best.square().sum().item() / (k + 1) ** 2
    assert broken["nesterov"] == 0 < broken["plain"]


@claim.parity(peer="torch.optim.SGD(nesterov=True)")
def equals_torch():
    """Fifty steps of random gradients are those of torch.optim.SGD(nesterov=True), the recipe's optimizer too."""
    torch.manual_seed(0)
    start = torch.randn(5, 7, dtype=torch.float64)
    theirs, model = nn.Parameter(start.clone()), nn.Linear(7, 5, bias=False).double()
    model.weight.data.copy_(start)
    peer = torch.optim.SGD([theirs], lr=0.05, momentum=0.9, nesterov=True)
    ours, velocity, recipes = start, None, optimizers.nesterov(model, lr=0.05, momentum=0.9)
    for _ in range(50):
        theirs.grad = torch.randn_like(start)
        model.weight.grad = theirs.grad.clone()
        peer.step()
        recipes.step()
        ours, velocity = descend_ahead(ours, theirs.grad, velocity, lr=0.05, momentum=0.9)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.weight, theirs)
