"""A Simple Framework for Contrastive Learning of Visual Representations. Chen, Kornblith, Norouzi, Hinton, 2020.
arXiv:2002.05709

A ResNet, but it learns without labels, by telling which two of many views are of the same image.

Two random changes of an image still show the same thing, and all other images of the batch serve as examples of what
is different. A small network between the features and the loss may forget what the changes changed; the features
before it are what is kept. Here the views turn, move, scale and blur with noise, as suits digits without colour, the
batch is small and the optimizer AdamW in place of LARS. Maps are normalised in groups of channels, not over the
batch, so that nothing can be told from whom one is batched with.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_VECTORS, needs
from deltax.papers.vision.backbones.resnet import Backbone, resnet
from deltax.parts.model.convolution import GroupNorm, SmallStem
from deltax.parts.model.mlp import relu
from deltax.parts.model.perceptron import Dense
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.parts.training.objectives import mixes
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.parts.training.views import jittered
from deltax.shapes import Images, PerExample
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.few_labels import LinearProbe

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

    interface = IMAGES_TO_VECTORS

    def __init__(self, channels: int, *, backbone: Part = part(Backbone), projector: Part = part(Projector)):
        super().__init__()
        self.backbone = backbone(channels)
        self.projector = projector(self.backbone.width)
        self.width = self.projector.width

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        """The mean over the last maps."""
        return self.backbone(images).mean((-2, -1))

    def forward(self, images: Images) -> Vectors:
        return of_length_one(self.projector(self.features(images)))


def nt_xent(first: Vectors, second: Vectors, *, temperature: float = 0.5) -> PerExample:
    """How surprising it is that first[i] and second[i], of length one, belong together, among all 2N; a mean of both
    directions, in nats (Eq. 1)."""
    n = len(first)
    every = torch.cat([first, second])
    scores = (similarity(every, every) / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n, device=first.device).roll(n)
    both = nn.functional.cross_entropy(scores, partner, reduction="none")
    return (both[:n] + both[n:]) / 2


@needs("images", model=IMAGES_TO_VECTORS)
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
        optimizer=part(adamw, lr=3e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )
