"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox, 2015. arXiv:1505.04597

An encoder and a decoder of convolutions, but the decoder also sees each map that the encoder made at its size.

Going down a network learns what is there and loses where. The maps from the way down still have the where, so they
are laid beside those on the way up, size by size. The paper's convolutions are not padded, so it crops; here, as
in the diffusion models that took the shape over, they are padded, halve by stride, and the map of every unit is
remembered, not the last of each size alone. `Pair` is the unit of the paper, `Conditioned` that of DDPM's network
(arXiv:2006.11239, appendix B), so that `UNet` can be the body of a `Denoiser`.
"""

import torch
from torch import nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_IMAGES, needs
from deltax.parts.attention.context import Context
from deltax.parts.model.convolution import GroupNorm
from deltax.parts.model.perceptron import Dense
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.roles import tag
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.pictures import Drawings


class Window(nn.Conv2d):
    """A convolution with bias that keeps the size at stride 1, W ~ N(0, gain / fan in) and b = 0."""

    def __init__(self, channels: int, out: int, *, size: int = 3, stride: int = 1, gain: float = 2.0):
        self.gain = gain
        super().__init__(channels, out, size, stride, padding=size // 2)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(self.gain / self.weight[0].numel()) ** 0.5)
        nn.init.zeros_(self.bias)


class Pair(nn.Module):
    """Two 3 x 3 convolutions, each with a relu (section 2). (B, C, Y, X) -> (B, D, Y, X)."""

    def __init__(self, channels: int, out: int, dim: int):
        super().__init__()
        self.first, self.second = Window(channels, out), Window(out, out)

    def forward(self, x: Images, ctx: Context) -> Maps:
        return torch.relu(self.second(torch.relu(self.first(x))))


class Conditioned(nn.Module):
    """x + second(silu(norm(first(silu(norm(x))) + of ctx.condition (B, dim)))). (B, C, Y, X) -> (B, D, Y, X)."""

    def __init__(self, channels: int, out: int, dim: int, *, map_norm: Part = part(GroupNorm, groups=8)):
        super().__init__()
        self.norm1, self.norm2 = map_norm(channels), map_norm(out)
        self.first, self.second = Window(channels, out), Window(out, out, gain=1.0)
        self.condition = Dense(dim, out)
        self.shortcut = nn.Identity() if channels == out else Window(channels, out, size=1, gain=1.0)

    def forward(self, x: Images, ctx: Context) -> Maps:
        silu = nn.functional.silu
        hidden = self.first(silu(self.norm1(x))) + self.condition(silu(ctx.condition))[:, :, None, None]
        return self.shortcut(x) + self.second(silu(self.norm2(hidden)))


def beside(x: Maps, remembered: Maps) -> Maps:
    """The map from the way down laid beside the one on the way up."""
    return torch.cat([x, remembered], 1)


def cut(x: Maps, remembered: Maps) -> Maps:
    """`beside`, with nothing remembered: the network without its skips, of the same parameters."""
    return torch.cat([x, torch.zeros_like(remembered)], 1)


class UNet(nn.Module):
    """Images (B, C, Y, X) -> images (B, C, Y, X); starts at zero. Any size of at least 2 ** (len(widths) - 1).

    At resolution i, half of the one before, `depth` units of widths[i] channels on the way down and depth + 1 on the
    way up; two at the bottom. dim is the width of ctx.condition.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int,
        *,
        widths: tuple[int, ...] = (16, 32),
        depth: int = 1,
        level: Part = part(Pair),
        skip: Part = part(beside),
        map_norm: Part = part(GroupNorm, groups=8),
    ):
        super().__init__()
        self.depth, self.skip = depth, skip
        width, kept = widths[0], [widths[0]]
        self.into = Window(channels, width)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, wide in enumerate(widths):
            self.down.append(nn.ModuleList(level(width if j == 0 else wide, wide, dim) for j in range(depth)))
            kept += [wide] * depth
            width = wide
            if i < len(widths) - 1:
                self.shrink.append(Window(wide, wide, stride=2, gain=1.0))
                kept.append(wide)
        self.middle = nn.ModuleList(level(width, width, dim) for _ in range(2))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for wide in reversed(widths):
            units = nn.ModuleList()
            for _ in range(depth + 1):
                units.append(level(width + kept.pop(), wide, dim))
                width = wide
            self.up.append(units)
            if len(self.up) < len(widths):
                self.grow.append(Window(wide, wide, gain=1.0))
        self.norm, self.out = map_norm(width), Window(width, channels, gain=0.0)

    def forward(self, x: Images, ctx: Context) -> Images:
        x = self.into(x)
        kept = [x]
        for i, units in enumerate(self.down):
            for unit in units:
                x = unit(x, ctx)
                kept.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
                kept.append(x)
        for unit in self.middle:
            x = unit(x, ctx)
        for i, units in enumerate(self.up):
            for unit in units:
                x = unit(self.skip(x, kept.pop()), ctx)
            if i < len(self.grow):
                x = self.grow[i](nn.functional.interpolate(x, size=kept[-1].shape[-2:]))
        return self.out(nn.functional.silu(self.norm(x)))


class Restorer(nn.Module):
    """body(images), told nothing else. Images -> images."""

    interface = IMAGES_TO_IMAGES

    def __init__(self, channels: int, size: int, *, dim: int = 1, body: Part = part(UNet)):
        super().__init__()
        self.body = body(channels, size, dim)

    def forward(self, images: Images) -> Images:
        return self.body(images, Context())


@needs("images", model=IMAGES_TO_IMAGES)
def restore(model: nn.Module, batch: Batch, *, noise: float = 0.5) -> PerExample:
    """Squared error, a mean over pixels, of images restored from Gaussian noise of this deviation."""
    spoilt = batch.images + noise * torch.randn_like(batch.images)
    return (model(spoilt) - batch.images).square().mean((1, 2, 3))


@paper(year=2015, arxiv="1505.04597")
def u_net(*, widths: tuple[int, ...] = (8, 16, 32), noise: float = 0.5) -> Part:
    return part(
        Run,
        model=part(Restorer, body=part(UNet, widths=tuple(widths))),
        task=part(Drawings, size=16),
        objective=part(restore, noise=noise),
        batches=from_task,
        optimizer=part(adamw, lr=3e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=32, steps=300),
    )
