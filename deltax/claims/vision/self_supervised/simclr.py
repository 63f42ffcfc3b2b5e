"""Claims of simclr: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import claim
from deltax.papers.vision.self_supervised.simclr import nt_xent
from deltax.parts.training.views import jittered
from deltax.shapes import Images


@claim
def who_cannot_tell_is_at_chance():
    """Where all views look alike the loss is log(2N - 1), and two that agree among orthogonal ones are below it."""
    for n in (2, 5):
        same = torch.ones(n, 7, dtype=torch.float64) / 7**0.5
        torch.testing.assert_close(nt_xent(same, same).double(), torch.full((n,), math.log(2 * n - 1)).double())
        apart = torch.eye(n, 7, dtype=torch.float64)
        best = -2.0 + math.log(math.exp(2.0) + 2 * n - 2)
        torch.testing.assert_close(nt_xent(apart, apart).double(), torch.full((n,), best).double())
        assert best < math.log(2 * n - 1)


@claim
def pairs_have_no_order_and_no_first():
    """Putting the pairs in another order, or swapping the views of each, moves the losses with them and no more; so
    the gradients."""
    torch.manual_seed(0)
    a, b = nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    order = torch.tensor([3, 0, 4, 1, 2])
    losses = nt_xent(a, b, temperature=0.2)
    torch.testing.assert_close(nt_xent(a[order], b[order], temperature=0.2), losses[order])
    torch.testing.assert_close(nt_xent(b, a, temperature=0.2), losses)
    a.requires_grad_()
    (straight,) = torch.autograd.grad(losses.new_ones(5) @ nt_xent(a, b), a)
    (turned,) = torch.autograd.grad(nt_xent(a[order], b[order]).sum(), a)
    torch.testing.assert_close(straight, turned, rtol=1e-5, atol=1e-6)


@claim.parity(peer="torch, Eq. 1 written pair by pair")
def is_the_equation():
    """Values and gradients are those of Eq. 1, written out pair by pair with exponentials."""
    torch.manual_seed(0)
    for n, t in ((2, 0.5), (5, 0.1)):
        leaves = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
        a, b = nn.functional.normalize(leaves, dim=-1)
        z = [*a, *b]

        def pair(i: int, j: int, z: list[Tensor] = z, t: float = t) -> Tensor:
            total = sum(torch.exp(z[i] @ z[k] / t) for k in range(len(z)) if k != i)
            return -torch.log(torch.exp(z[i] @ z[j] / t) / total)

        written = torch.stack([(pair(i, i + n) + pair(i + n, i)) / 2 for i in range(n)])
        ours = nt_xent(a, b, temperature=t).double()
        torch.testing.assert_close(ours, written, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(loss.sum(), leaves, retain_graph=True)[0] for loss in (ours, written)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@claim.measured(paper="76.5 % of ImageNet by a linear classifier on features learned without labels (Table 6)")
def features_are_learned_without_labels(lab):
    """Read by a linear classifier with 50 labels, features learned without a label tell at least 10 % more of the
    held-out digits than those of the network before training."""
    gains, runs = [], [lab.train("simclr", seed=seed) for seed in lab.seeds(3)]
    for run, seed in zip(runs, lab.seeds(3), strict=True):
        gains.append(lab.train("simclr", seed=seed, steps=1, lr_scale=0.0).score - run.score)
    task = lab.task("simclr")
    numbers = {"error of the probe, %": [run.score for run in runs], "of raw pixels": task.probe(_pixels).score}
    figures = {"A digit and eleven views of it": lab.figure(_views(task.all().images[:1]))}
    return lab.at_least(gains, 10.0, unit="% error of a linear probe", numbers=numbers, figures=figures)


@claim.measured(paper="features before the projection are read more than 10 % better than after it (section 4.2)")
def what_comes_before_the_projector_is_kept(lab):
    """A linear classifier reads held-out digits better from the features than from what the loss sees."""
    evaluations = [lab.train("simclr", seed=seed).evaluation for seed in lab.seeds(3)]
    gains = [e.metrics["error reading the output"] - e.score for e in evaluations]
    return lab.at_least(gains, 0.0, unit="% error of a linear probe")


def _pixels(images: Images) -> Float[Tensor, "B D"]:
    return images.flatten(1)


def _views(image: Images):
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    figure = Figure(figsize=(6, 0.8), layout="constrained")
    shown = torch.cat([image, jittered(image.expand(11, -1, -1, -1))])[:, 0]
    for axes, picture in zip(figure.subplots(1, 12), shown, strict=True):
        axes.imshow(picture, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_axis_off()
    return figure
