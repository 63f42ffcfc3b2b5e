"""A Simple Framework for Contrastive Learning of Visual Representations. Chen, Kornblith, Norouzi, Hinton, 2020.
arXiv:2002.05709

A ResNet, but trained without labels: two views of an image must be closer than views of other images.

Two random augmentations of an image are a positive pair; the other images of the batch are negatives. A small projector
between features and loss may discard what the augmentations change; the features before it are kept. Here the views
rotate, move, scale and add noise, as suits digits without colour; the batch is small, and AdamW replaces LARS. Group
norm replaces batch norm, so that no information passes between the images of a batch.
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
    """Images (B, C, Y, X) -> (B, .width), L2-normalised. `features` is the output before the projector."""

    interface = IMAGES_TO_VECTORS

    def __init__(self, channels: int, *, backbone: Part = part(Backbone), projector: Part = part(Projector)):
        super().__init__()
        self.backbone = backbone(channels)
        self.projector = projector(self.backbone.width)
        self.width = self.projector.width

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        """The mean over the last maps: h."""
        return self.backbone(images).mean((-2, -1))

    def forward(self, images: Images) -> Vectors:
        # z = W2 relu(W1 h), normalised here, so that similarity is a dot product
        return of_length_one(self.projector(self.features(images)))


@needs("images", model=IMAGES_TO_VECTORS)
@mixes("the negatives of an example are the others of its piece")
def contrast(model: nn.Module, batch: Batch, *, view: Part = part(jittered), temperature: float = 0.5) -> PerExample:
    """`nt_xent` of two views of each image. The negatives are the other images of the same micro-batch."""
    first, second = model(torch.cat([view(batch.images), view(batch.images)])).chunk(2)
    return nt_xent(first, second, temperature=temperature)


@paper(on=resnet, year=2020, arxiv="2002.05709")
def simclr(*, width: int = 8, temperature: float = 0.5) -> Part:
    stem = part(SmallStem, map_norm=GroupNorm)
    backbone = part(Backbone, stem=stem, stem_width=width, widths=(width, 2 * width, 4 * width), depths=(1, 1, 1))
    return part(
        Run,
        # batch norm would leak the partner through its statistics
        model=part(Contrastive, backbone=backbone.fill("map_norm", GroupNorm)),
        task=LinearProbe,
        objective=part(contrast, temperature=temperature),
        batches=from_task,
        optimizer=part(adamw, rate=3e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


def nt_xent(first: Vectors, second: Vectors, *, temperature: float = 0.5) -> PerExample:
    """NT-Xent in nats, averaged over both directions; first[i] and second[i], L2-normalised, are the i-th pair (Eq.
    1)."""
    n = len(first)
    every = torch.cat([first, second])  # (2N, K)
    # sim(z_i, z_k) / tau; -infinity on the diagonal is the indicator k != i of Eq. 1
    scores = (similarity(every, every) / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n, device=first.device).roll(n)  # i and i + N are a pair
    both = nn.functional.cross_entropy(scores, partner, reduction="none")
    return (both[:n] + both[n:]) / 2
