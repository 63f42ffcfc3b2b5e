"""Claims of batch-norm: the paper's equations, parity with peers, and what it measures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltax import Part, claim, part
from deltax.papers.optimization.normalization.batch_norm import BatchNorm, Channels, batch_norm, folded
from deltax.parts.model.perceptron import Perceptron, classifier, sigmoid, tanh
from deltax.parts.training.optimizers import sgd
from deltax.parts.training.schedules import constant
from deltax.tasks.images.digits import Digits


def standardised(x: Channels, *, eps: float = 1e-5) -> Channels:
    """(x - mean) / sqrt(var + eps), both taken over all axes but the second, var biased (Alg. 1); the reference."""
    others = [0, *range(2, x.ndim)]
    centred = x - x.mean(others, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(others, keepdim=True) + eps)


@claim
def is_the_equation():
    """In training the module is Alg. 1, written out, with its gradients, and its averages are those of Alg. 2."""
    torch.manual_seed(0)
    for shape in ((7, 5), (3, 5, 4, 3)):
        norm = _random(5)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        form = (5, *[1] * (len(shape) - 2))
        ours, written = norm(x), norm.weight.view(form) * standardised(x) + norm.bias.view(form)
        torch.testing.assert_close(ours, written)
        weights = torch.randn_like(x)
        slopes = (torch.autograd.grad((y * weights).sum(), [x, norm.weight, norm.bias]) for y in (ours, written))
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b)
        others = [0, *range(2, x.ndim)]
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * x.mean(others))
        torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * x.var(others))


@claim
def the_size_of_the_weights_is_forgotten():
    """Ten times the weights before it change nothing, up to eps, and their gradient is a tenth (section 3.3)."""
    torch.manual_seed(0)
    norm, x = _random(5), torch.randn(9, 7, dtype=torch.float64)
    weight, push = torch.randn(5, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    found = []
    for scale in (1.0, 10.0):
        w = (scale * weight).requires_grad_()
        y = norm(x @ w.mT)
        found.append((y, torch.autograd.grad((y * push).sum(), w)[0] * scale))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@claim
def the_bias_before_it_is_redundant():
    """Whatever is added to a channel before the norm, nothing changes, and no gradient reaches it."""
    torch.manual_seed(0)
    norm, x = _random(5), torch.randn(9, 5, 3, dtype=torch.float64)
    bias = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    y = norm(x + bias)
    torch.testing.assert_close(y, norm(x))
    assert torch.autograd.grad((y * torch.randn_like(y)).sum(), bias)[0].abs().max() < 1e-9


@claim
def in_use_it_folds_into_the_map_before():
    """In evaluation a convolution or a linear map with folded weights gives what the map and its norm gave."""
    torch.manual_seed(0)
    for map_, x in ((nn.Conv2d(3, 5, 3), torch.randn(2, 3, 7, 5)), (nn.Linear(7, 5, bias=False), torch.randn(4, 7))):
        map_, x, norm = map_.double(), x.double(), _random(5).eval()
        apply = nn.functional.conv2d if x.ndim == 4 else nn.functional.linear
        torch.testing.assert_close(apply(x, *folded(map_.weight, map_.bias, norm)), norm(map_(x)))


@claim.parity(peer="torch.nn.BatchNorm1d and BatchNorm2d")
def equals_torch():
    """Outputs, gradients and new averages are torch's, over three batches in training and then in evaluation."""
    torch.manual_seed(0)
    for peer, shape in ((nn.BatchNorm1d, (7, 5)), (nn.BatchNorm1d, (3, 5, 4)), (nn.BatchNorm2d, (2, 5, 3, 7))):
        ours, theirs = _random(5), peer(5).double()
        theirs.load_state_dict(ours.state_dict())
        for training in (True, True, True, False):
            x, weights = torch.randn(2, *shape, dtype=torch.float64)
            found = []
            for norm in (ours.train(training), theirs.train(training)):
                leaf = x.clone().requires_grad_()
                y = norm(leaf)
                found.append([y, *torch.autograd.grad((y * weights).sum(), [leaf, norm.weight, norm.bias])])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)


RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@claim.measured(paper="the same accuracy in 14 times fewer steps, at rates 5 and 30 times as large (section 4.2.2)")
def less_thought_about_the_rate(lab):
    """Six layers of sigmoids learn to read digits over a range of learning rates at least ten times as wide with batch
    norm as without.

    Of seven rates from 0.003 to 3, half a decade apart, those at which more than 90 % of held-out digits are read.
    """
    wider, counts = [], []
    for seed in lab.seeds(3):
        both = [sum(_accuracy(lab, net, seed, lr_scale) > 0.9 for lr_scale in RATES) for net in _networks(sigmoid)]
        counts.append(both)
        wider.append((both[1] - both[0]) / 2)
    numbers = {"rates of seven that read 90 %: without, with": counts}
    return lab.at_least(wider, 1.0, unit="decades of the rate", numbers=numbers)


@claim.measured(paper="Inception's accuracy in 14 times fewer steps (Figure 3)")
def fewer_steps(lab):
    """Each at the rate that served it best on another seed, six layers of tanh read 90 % of held-out digits in at
    most half the steps with batch norm.

    Steps are looked at in powers of two from 10 to 640; a network that is not there after 640 counts as 1280.
    """
    plain, normed = _networks(tanh)
    best = [max(RATES, key=lambda lr_scale: _accuracy(lab, net, 0, lr_scale)) for net in (plain, normed)]
    faster = []
    for seed in lab.seeds(3):
        first = [_first(lab, net, seed, lr_scale) for net, lr_scale in zip((plain, normed), best, strict=True)]
        faster.append(math.log2(first[0] / first[1]))
    return lab.at_least(faster, 1.0, unit="halvings of the steps", numbers={"rates: without, with": best})


def _networks(activation: Callable[[Tensor], Tensor]) -> tuple[Part, Part]:
    """Six layers of 64, without and with the norm, under plain gradient steps at a constant rate of one."""
    run = classifier(part(Perceptron, widths=(64,) * 6, activation=activation), part(Digits), steps=300)
    run = run.fill("optimizer", sgd, lr=1.0, momentum=0.9).fill("schedule", constant).put("loop.max_grad_norm", 1000.0)
    return run, run + batch_norm


def _accuracy(lab, network: Part, seed: int, lr_scale: float, steps: int = 300) -> float:
    run = lab.train(network, seed=seed, lr_scale=lr_scale, steps=steps)
    return 0.0 if run.diverged else run.evaluation.metrics["accuracy"]


def _first(lab, network: Part, seed: int, lr_scale: float) -> int:
    looks = [10 * 2**i for i in range(7)]
    return next((n for n in looks if _accuracy(lab, network, seed, lr_scale, n) > 0.9), 2 * looks[-1])


def _random(channels: int) -> BatchNorm:
    norm = BatchNorm(channels).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm
