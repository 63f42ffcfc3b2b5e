"""Backpropagation Applied to Handwritten Zip Code Recognition. LeCun, Boser, Denker, Henderson, Howard, Hubbard,
Jackel, 1989.

A network trained whole by back-propagation, but its first layers look through small windows that share their weights.

A stroke means the same wherever it stands, so one set of weights looks for it everywhere, and a map says where it was
found. Weights are shared and biases are not: each unit has its own. The paper does not print which maps of the first
layer each of the second sees; here, as in Karpathy's re-run, three groups of four see eight maps each. Plain gradient
steps stand in for the paper's diagonal of the Hessian. Its output units end in a tanh; it stands in the objective.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.parts.model.identity import Identity
from deltax.parts.model.perceptron import tanh
from deltax.parts.training.optimizers import sgd
from deltax.parts.training.roles import tag
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import constant
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.zip_codes import ZipCodes

PAPER = -1.0  # the value of what has no ink, and of what lies outside
GROUPS = (tuple(range(8)), tuple(range(4, 12)), (*range(4), *range(8, 12)))  # maps of H1 that four of H2 see
PASSES, IMAGES = 23, 300


class Detectors(nn.Module):
    """Windows of 5 by 5 at every second place, over a border of -1. Images (B, C, Y, X) -> (B, D, Y/2, X/2).

    Weights are shared over places, biases are not. groups[i] names the maps that the i-th part of the D maps sees.
    """

    def __init__(self, size: int, out: int, groups: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.groups, seen = groups, len(groups[0])
        self.weight = tag(nn.Parameter(torch.empty(out, seen, 5, 5)), "matrix")
        self.bias = tag(nn.Parameter(torch.empty(out, size // 2, size // 2)), "vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.weight[0].numel())
        nn.init.zeros_(self.bias)

    def forward(self, x: Images) -> Maps:
        padded = nn.functional.pad(x, (2, 2, 2, 2), value=PAPER)
        seen = torch.cat([padded[:, group] for group in self.groups], 1) if len(self.groups) > 1 else padded
        return nn.functional.conv2d(seen, self.weight, stride=2, groups=len(self.groups)) + self.bias


class Units(nn.Linear):
    """x W' + b, W uniform in +-2.4 / sqrt(fan in); b starts at `bias`. (B, D) -> (B, F)."""

    def __init__(self, dim: int, out: int, *, bias: float = 0.0):
        self.start = bias
        super().__init__(dim, out)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.in_features)
        nn.init.constant_(self.bias, self.start)


class LeNet(nn.Module):
    """Images (B, 1, 16, 16) -> logits (B, V): 12 maps of 8 by 8, 12 of 4 by 4, 30 units (Figure 3)."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        activation: Part = part(tanh),
        map_norm: Part = part(Identity),
        dropout: Part = part(Identity),
    ):
        super().__init__()
        self.h1 = Detectors(size, 12, ((0,),))
        self.h2 = Detectors(size // 2, 12, GROUPS)
        self.h3 = Units(12 * (size // 4) ** 2, 30)
        self.output = Units(30, classes, bias=-1.0)
        self.norms = nn.ModuleList(map_norm(12) for _ in range(2))
        self.activation, self.dropout = activation, dropout()

    def features(self, images: Images) -> Float[Tensor, "B 30"]:
        """What H3 makes of an image."""
        first, second = self.norms
        maps = self.activation(first(self.h1(images)))
        maps = self.activation(second(self.h2(maps)))
        return self.activation(self.h3(self.dropout(maps.flatten(1))))

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.output(self.features(images))


@needs("images", "labels", model=IMAGES_TO_LOGITS)
def squared_error(model: nn.Module, batch: Batch) -> PerExample:
    """Mean over classes of (tanh(z) - t)^2, t = 1 for the class shown and -1 for the others."""
    said = torch.tanh(model(batch.images).float())
    right = 2 * nn.functional.one_hot(batch.labels, said.shape[-1]) - 1
    return (said - right).square().mean(-1)


@paper(year=1989, url="https://doi.org/10.1162/neco.1989.1.4.541")
def lenet_1989(*, passes: int = PASSES, images: int = IMAGES) -> Part:
    return part(
        Run,
        model=LeNet,
        task=part(ZipCodes, images=images),
        objective=squared_error,
        batches=from_task,
        optimizer=part(sgd, lr=0.03, momentum=0.0),
        schedule=constant,
        loop=part(Loop, batch=1, steps=passes * images, max_grad_norm=1000.0),
    )


def _uniform(weight: Tensor, fan_in: int) -> None:
    """+-2.4 / sqrt(fan in); the paper prints 2.4 / fan in, from which this network would hardly start to learn."""
    bound = 2.4 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound)
