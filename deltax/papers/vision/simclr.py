"""A Simple Framework for Contrastive Learning of Visual Representations. Chen, Kornblith, Norouzi, Hinton, 2020.
arXiv:2002.05709

A ResNet, but it learns without labels, by telling which two of many views are of the same image.

Two random changes of an image still show the same thing, and all other images of the batch serve as examples of what
is different. A small network between the features and the loss may forget what the changes changed; the features
before it are what is kept. Here the views turn, move, scale and blur with noise, as suits digits without colour, the
batch is small and the optimizer AdamW in place of LARS. Maps are normalised in groups of channels, not over the
batch, so that nothing can be told from whom one is batched with.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.papers.vision.resnet import Backbone, resnet
from deltax.parts.convolution import GroupNorm, SmallStem
from deltax.parts.mlp import relu
from deltax.parts.objectives import mixes
from deltax.parts.optimizers import adamw
from deltax.parts.perceptron import Dense
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.views import jittered
from deltax.shapes import Images, PerExample
from deltax.tasks.digits import Batch
from deltax.tasks.few_labels import LinearProbe

Vectors = Float[Tensor, "N K"]


class Projector(nn.Module):
    """W2 relu(W1 h) (section 2.1). (B, D) -> (B, width)."""

    def __init__(self, dim: int, *, width: int = 32, activation: Part = part(relu)):
        super().__init__()
        self.into, self.out, self.width = Dense(dim, dim), Dense(dim, width), width
        self.activation = activation

    def forward(self, x: Float[Tensor, "B D"]) -> Vectors:
        return self.out(self.activation(self.into(x)))


class Contrastive(nn.Module):
    """Images (B, C, Y, X) -> (B, .width) of length one. `features` are what comes before the projector."""

    def __init__(self, channels: int, *, backbone: Part = part(Backbone), projector: Part = part(Projector)):
        super().__init__()
        self.backbone = backbone(channels)
        self.projector = projector(self.backbone.width)
        self.width = self.projector.width

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        """The mean over the last maps."""
        return self.backbone(images).mean((-2, -1))

    def forward(self, images: Images) -> Vectors:
        return nn.functional.normalize(self.projector(self.features(images)), dim=-1)


def nt_xent(first: Vectors, second: Vectors, *, temperature: float = 0.5) -> PerExample:
    """How surprising it is that first[i] and second[i], of length one, belong together, among all 2N; a mean of both
    directions, in nats (Eq. 1)."""
    n = len(first)
    every = torch.cat([first, second])
    scores = (every @ every.mT / temperature).float().fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n, device=first.device).roll(n)
    both = nn.functional.cross_entropy(scores, partner, reduction="none")
    return (both[:n] + both[n:]) / 2


@mixes("the negatives of an example are the others of its piece")
def contrast(model: nn.Module, batch: Batch, *, view: Part = part(jittered), temperature: float = 0.5) -> PerExample:
    """`nt_xent` of two views of each image. What an image is told from is its own piece of the batch."""
    first, second = model(torch.cat([view(batch.images), view(batch.images)])).chunk(2)
    return nt_xent(first, second, temperature=temperature)


@paper(on=resnet, year=2020, arxiv="2002.05709")
def simclr(*, width: int = 8, temperature: float = 0.5) -> Part:
    stem = part(SmallStem, map_norm=GroupNorm)
    backbone = part(Backbone, stem=stem, stem_width=width, widths=(width, 2 * width, 4 * width), depths=(1, 1, 1))
    return part(
        Run,
        model=part(Contrastive, backbone=backbone.fill("map_norm", GroupNorm)),
        task=LinearProbe,
        objective=part(contrast, temperature=temperature),
        batches=from_task,
        optimizer=part(adamw, rate=3e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


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
        gains.append(lab.train("simclr", seed=seed, steps=1, rate=0.0).score - run.score)
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
