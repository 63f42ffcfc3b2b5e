"""Convolutions, the norm of their maps when it is frozen, and what networks of them begin with."""

from collections.abc import Iterator

import torch
from torch import nn

from deltax.parts.training.roles import tag
from deltax.recipe import Part, part
from deltax.shapes import Images, Maps


class Conv(nn.Conv2d):
    """A convolution without bias that keeps the size at stride 1, drawn from N(0, 2 / fan out).

    The start is Eq. 14 of arXiv:1502.01852.
    """

    def __init__(self, channels: int, out: int, *, size: int = 3, stride: int = 1):
        super().__init__(channels, out, size, stride, padding=size // 2, bias=False)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm by its stored statistics, also while training, and with a gain and bias that do not learn.

    For a backbone trained elsewhere and batches too small to give statistics. Images (B, C, Y, X) -> (B, C, Y, X).
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.requires_grad_(False)

    def forward(self, x: Images) -> Images:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class GroupNorm(nn.GroupNorm):
    """Each example standardised over groups of neighbouring channels (arXiv:1803.08494): nothing passes from one
    example to another. Images (B, C, Y, X) -> (B, C, Y, X). `groups`, or the largest number below that divides C."""

    def __init__(self, channels: int, *, groups: int = 4, eps: float = 1e-5):
        super().__init__(next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0), channels, eps=eps)


class ConvNorm(nn.Module):
    """norm(convolution). Images (B, C, Y, X) -> (B, D, Y/stride, X/stride)."""

    def __init__(
        self, channels: int, out: int, *, size: int = 3, stride: int = 1, map_norm: Part = part(nn.BatchNorm2d)
    ):
        super().__init__()
        self.conv = Conv(channels, out, size=size, stride=stride)
        self.norm = map_norm(out)

    def forward(self, x: Images) -> Maps:
        return self.norm(self.conv(x))


class Stem(ConvNorm):
    """relu of a normed 7 x 7 convolution, then the largest of 3 x 3, both of stride 2: (B, D, Y/4, X/4)."""

    def __init__(self, channels: int, out: int, *, map_norm: Part = part(nn.BatchNorm2d)):
        super().__init__(channels, out, size=7, stride=2, map_norm=map_norm)
        self.stride = 4

    def forward(self, images: Images) -> Maps:
        return nn.functional.max_pool2d(torch.relu(super().forward(images)), 3, stride=2, padding=1)


class SmallStem(ConvNorm):
    """relu of a normed 3 x 3 convolution, for small images: (B, D, Y/stride, X/stride)."""

    def __init__(self, channels: int, out: int, *, stride: int = 1, map_norm: Part = part(nn.BatchNorm2d)):
        super().__init__(channels, out, stride=stride, map_norm=map_norm)
        self.stride = stride

    def forward(self, images: Images) -> Maps:
        return torch.relu(super().forward(images))


class ConvNet(nn.Module):
    """A plain convolutional network: stages of two normed 3 x 3 convolutions, each with a relu.

    Images (B, C, Y, X) -> maps (B, .width, Y', X'). Each stage after the first halves the image: `strides` gives the
    pixels that a cell of each stage's maps stands for.
    """

    def __init__(self, channels: int, *, widths: tuple[int, ...] = (16, 32, 64), map_norm: Part = part(nn.BatchNorm2d)):
        super().__init__()
        self.stages = nn.ModuleList()
        before = channels
        for i, width in enumerate(widths):
            first = ConvNorm(before, width, stride=1 if i == 0 else 2, map_norm=map_norm)
            second = ConvNorm(width, width, map_norm=map_norm)
            self.stages.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))
            before = width
        self.width, self.widths = before, widths
        self.strides = tuple(2**i for i in range(len(widths)))

    def each(self, images: Images) -> Iterator[Maps]:
        """The maps after every stage."""
        x = images
        for stage in self.stages:
            x = stage(x)
            yield x

    def forward(self, images: Images) -> Maps:
        *_, last = self.each(images)
        return last
