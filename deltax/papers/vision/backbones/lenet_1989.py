"""Backpropagation Applied to Handwritten Zip Code Recognition. LeCun, Boser, Denker, Henderson, Howard, Hubbard,
Jackel, 1989.

A network trained end to end by back-propagation, but its first layers are local windows with shared weights.

The same stroke may appear anywhere, so one set of weights detects it everywhere and a feature map holds where it was
detected. Weights are shared over positions; biases are not. The paper does not print which H1 maps each H2 map is
connected to; here, as in Karpathy's re-run, each third of the H2 maps is connected to eight H1 maps. Plain SGD replaces
the paper's step with a diagonal Hessian. The output units' tanh is part of the objective here.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.parts.model.nothing import Nothing
from deltax.parts.model.perceptron import tanh
from deltax.parts.training.optimizers import sgd
from deltax.parts.training.roles import tag
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import constant
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.zip_codes import ZipCodes

PAPER = -1.0  # the value of background pixels, and of the padding
GROUPS = (tuple(range(8)), tuple(range(4, 12)), (*range(4), *range(8, 12)))  # H1 maps of each four H2 maps
PASSES, IMAGES = 23, 300


@needs("images", "labels", model=IMAGES_TO_LOGITS)
def squared_error(model: nn.Module, batch: Batch) -> PerExample:
    """Mean over classes of (tanh(z) - t)^2, t = 1 for the true class and -1 for the others."""
    said = torch.tanh(model(batch.images).float())
    right = 2 * nn.functional.one_hot(batch.labels, said.shape[-1]) - 1
    return (said - right).square().mean(-1)


class LeNet(nn.Module):
    """Images (B, 1, 16, 16) -> logits (B, V): 12 maps of 8 x 8, 12 of 4 x 4, 30 units (Figure 3)."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self, size: int, classes: int, *, activation: Part = part(tanh), map_norm: Part = part(Nothing),
        dropout: Part = part(Nothing),
    ):  # fmt: skip
        super().__init__()
        self.h1 = Detectors(size, 12, ((0,),))  # 1068 parameters
        self.h2 = Detectors(size // 2, 12, GROUPS)  # 2592
        self.h3 = Units(12 * (size // 4) ** 2, 30)  # 5790
        self.output = Units(30, classes, bias=-1.0)  # 310; -1 is the target of most classes
        self.norms = nn.ModuleList(map_norm(12) for _ in range(2))
        self.activation, self.dropout = activation, dropout()

    def features(self, images: Images) -> Float[Tensor, "B 30"]:
        """The output of H3."""
        first, second = self.norms
        maps = self.activation(first(self.h1(images)))
        maps = self.activation(second(self.h2(maps)))
        return self.activation(self.h3(self.dropout(maps.flatten(1))))

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.output(self.features(images))


@paper(year=1989, url="https://doi.org/10.1162/neco.1989.1.4.541")
def lenet_1989(*, passes: int = PASSES, images: int = IMAGES) -> Part:
    return part(
        Run,
        model=LeNet,
        task=part(ZipCodes, images=images),
        objective=squared_error,
        batches=from_task,
        optimizer=part(sgd, rate=0.03, momentum=0.0),
        schedule=constant,
        loop=part(Loop, batch=1, steps=passes * images, clip=1000.0),  # one example at a time
    )


class Detectors(nn.Module):
    """5 x 5 convolution of stride 2 with padding -1. Images (B, C, Y, X) -> (B, D, Y/2, X/2).

    Weights are shared over positions, biases are not. groups[i] lists the input maps of the i-th part of the D output
    maps.
    """

    def __init__(self, size: int, out: int, groups: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.groups, seen = groups, len(groups[0])
        # (D, maps per group, 5, 5)
        self.weight = tag(nn.Parameter(torch.empty(out, seen, 5, 5)), "matrix")
        # one bias per unit: (D, Y/2, X/2)
        self.bias = tag(nn.Parameter(torch.empty(out, size // 2, size // 2)), "vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.weight[0].numel())
        nn.init.zeros_(self.bias)

    def forward(self, x: Images) -> Maps:
        padded = nn.functional.pad(x, (2, 2, 2, 2), value=PAPER)
        # (B, sum of group sizes, Y + 4, X + 4): each group's input maps side by side for one grouped convolution
        seen = torch.cat([padded[:, group] for group in self.groups], 1) if len(self.groups) > 1 else padded
        return nn.functional.conv2d(seen, self.weight, stride=2, groups=len(self.groups)) + self.bias


class Units(nn.Linear):
    """A linear layer x W' + b, W uniform in +-2.4 / sqrt(fan in); b starts at `bias`. (B, D) -> (B, F)."""

    def __init__(self, dim: int, out: int, *, bias: float = 0.0):
        self.start = bias
        super().__init__(dim, out)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.in_features)
        nn.init.constant_(self.bias, self.start)


def _uniform(weight: Tensor, fan_in: int) -> None:
    """+-2.4 / sqrt(fan in). The paper prints 2.4 / fan in, with which this network hardly starts to train."""
    bound = 2.4 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound)
