"""Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun, 2015. arXiv:1512.03385

A deep convolutional network, but each unit learns only what to add to its input.

Stack more plain layers and training itself gets worse, though the deeper net could copy the shallower one. A unit
that has only to learn a difference copies by learning nothing. Networks for ImageNet begin with a stem that cuts the
image down by four; the one built here is of the kind of section 4.2, 6n + 2 layers for small images. The stride of a
bottleneck sits on its 3 x 3 convolution, as in every released set of weights, not on the first 1 x 1 as printed.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_LOGITS
from deltax.papers.optimization.normalization.batch_norm import BatchNorm
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.parts.model.convolution import ConvNorm, SmallStem, Stem
from deltax.parts.model.linear import Linear
from deltax.parts.training.objectives import classify
from deltax.parts.training.optimizers import sgd
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Images, Maps
from deltax.tasks.images.pictures import Pictures


class Convolutions(nn.ModuleList):
    """Normed convolutions, one after the other, with a relu between. Images (B, C, Y, X) -> (B, D, Y', X')."""

    def forward(self, x: Images) -> Maps:
        *inner, last = self
        for layer in inner:
            x = torch.relu(layer(x))
        return last(x)


class Basic(Convolutions):
    """Two 3 x 3 convolutions, the first with the stride (Figure 5, left)."""

    def __init__(self, channels: int, out: int, stride: int, *, map_norm: Part = part(BatchNorm)):
        super().__init__(
            [ConvNorm(channels, out, stride=stride, map_norm=map_norm), ConvNorm(out, out, map_norm=map_norm)]
        )


class Bottleneck(Convolutions):
    """1 x 1 down to a `squeeze`-th of the channels, 3 x 3 with the stride, 1 x 1 up again (Figure 5, right)."""

    def __init__(self, channels: int, out: int, stride: int, *, squeeze: int = 4, map_norm: Part = part(BatchNorm)):
        inner = out // squeeze
        super().__init__(
            [
                ConvNorm(channels, inner, size=1, map_norm=map_norm),
                ConvNorm(inner, inner, stride=stride, map_norm=map_norm),
                ConvNorm(inner, out, size=1, map_norm=map_norm),
            ]
        )


class Plain(nn.Module):
    """relu(branch(x)): a unit of the networks that ResNet is compared with."""

    def __init__(self, channels: int, out: int, stride: int, *, branch: Part = part(Basic)):
        super().__init__()
        self.branch = branch(channels, out, stride)

    def forward(self, x: Images) -> Maps:
        return torch.relu(self.branch(x))


class Residual(nn.Module):
    """relu(branch(x) + x), or, where the shapes differ, a normed 1 x 1 convolution of x (Eq. 1 and 2, option B)."""

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        *,
        branch: Part = part(Basic),
        map_norm: Part = part(BatchNorm),
    ):
        super().__init__()
        self.branch = branch(channels, out, stride)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(channels, out, size=1, stride=stride, map_norm=map_norm)

    def forward(self, x: Images) -> Maps:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Backbone(nn.Module):
    """stem -> stages of units. Images (B, C, Y, X) -> maps (B, .width, Y', X').

    Stage i has depths[i] units of widths[i] channels; each stage after the first halves the image: `strides` gives the
    pixels that a cell of each stage's maps stands for.
    """

    def __init__(
        self,
        channels: int,
        *,
        stem: Part = part(Stem, map_norm=BatchNorm),
        stem_width: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        unit: Part = part(Residual),
    ):
        super().__init__()
        self.stem = stem(channels, stem_width)
        self.stages = nn.ModuleList()
        before = stem_width
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            first = unit(before, width, 1 if i == 0 else 2)
            self.stages.append(nn.Sequential(first, *(unit(width, width, 1) for _ in range(depth - 1))))
            before = width
        self.width, self.widths = before, widths

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.stem.stride * 2**i for i in range(len(self.widths)))

    def each(self, images: Images) -> Iterator[Maps]:
        """The maps after every stage."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            yield x

    def forward(self, images: Images) -> Maps:
        *_, last = self.each(images)
        return last


class ResNet(nn.Module):
    """Images (B, C, Y, X) -> logits (B, V), of the mean over the last maps. `channels`, `classes`: the task's."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self, channels: int, classes: int, *, backbone: Part = part(Backbone), classifier: Part = part(Linear)
    ):
        super().__init__()
        self.backbone = backbone(channels)
        self.classifier = classifier(self.backbone.width, classes)

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.classifier(self.backbone(images).mean((-2, -1)))


@paper(on=(lenet_1989, BatchNorm), year=2015, arxiv="1512.03385")
def resnet(*, n: int = 1, width: int = 8) -> Part:
    stem = part(SmallStem, map_norm=BatchNorm)
    backbone = part(Backbone, stem=stem, stem_width=width, widths=(width, 2 * width, 4 * width), depths=(n, n, n))
    return part(
        Run,
        model=part(ResNet, backbone=backbone),
        task=Pictures,
        objective=classify,
        batches=from_task,
        optimizer=sgd,
        schedule=cosine,
        loop=part(Loop, batch=64, steps=300),
    )
