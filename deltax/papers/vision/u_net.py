"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox, 2015. arXiv:1505.04597

An encoder and a decoder of convolutions, but the decoder also sees each map that the encoder made at its size.

Going down a network learns what is there and loses where. The maps from the way down still have the where, so they
are laid beside those on the way up, size by size. The paper's convolutions are not padded, so it crops; here, as
in the diffusion models that took the shape over, they are padded, halve by stride, and the map of every unit is
remembered, not the last of each size alone. `Pair` is the unit of the paper, `Conditioned` that of DDPM's network
(arXiv:2006.11239, appendix B), so that `UNet` can be the body of a `Denoiser`.
"""

import re

import torch
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import IMAGES_TO_IMAGES, needs
from deltax.parts.context import Context
from deltax.parts.convolution import GroupNorm
from deltax.parts.optimizers import adamw
from deltax.parts.perceptron import Dense
from deltax.parts.roles import tag
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.digits import Batch
from deltax.tasks.pictures import Drawings


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
        optimizer=part(adamw, rate=3e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=32, steps=300),
    )


_ROOMS = (
    (r"conv_in\.", "into."),
    (r"conv_norm_out\.", "norm."),
    (r"conv_out\.", "out."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"shrink.\1."),
    (r"mid_block\.resnets\.(\d+)\.", r"middle.\1."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.\2."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"grow.\1."),
)
_THINGS = {"conv1.": "first.", "conv2.": "second.", "time_emb_proj.": "condition.", "conv_shortcut.": "shortcut."}


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `diffusers` UNet2DModel without attention as that of a `UNet` of `Conditioned` units.

    Its embedding of the time, which stays outside, is left out.
    """
    ours = {}
    for name, value in state.items():
        for pattern, room in _ROOMS:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", room, name)
                for theirs, thing in _THINGS.items():
                    name = name.replace(theirs, thing)
                ours[name] = value
    return ours


@claim
def the_bottom_alone_cannot_say_where():
    """With its skips cut, and no way to pass but the bottom, two images that differ only in detail that halving loses
    come out the same, to the bit; with skips they do not."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 10, dtype=torch.float64)
    for skip in (beside, cut):
        model = _random(UNet(1, 6, 1, widths=(8, 16), skip=part(skip)))
        with torch.no_grad():  # a first convolution that copies, and a halving that sees every second pixel
            model.into.weight.zero_()
            model.into.weight[:, :, 1, 1] = 1
            model.into.bias.zero_()
            for conv in (model.down[0][0].first, model.down[0][0].second, model.shrink[0]):
                conv.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        other = x.clone()
        other[..., 1::2, :] += 1
        same = torch.equal(model(x, Context()), model(other, Context()))
        assert same == (skip is cut)


@claim
def any_size_comes_back():
    """Images of odd sizes come back at their own, with a gradient for every pixel and every weight."""
    for size in ((16, 16), (7, 11), (4, 5)):
        model = _random(UNet(2, 16, 3, widths=(4, 8, 8), level=part(Conditioned)))
        x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
        y = model(x, Context(condition=torch.randn(2, 3, dtype=torch.float64)))
        assert y.shape == x.shape
        y.square().sum().backward()
        assert (x.grad != 0).all() and all(p.grad.abs().sum() > 0 for p in model.parameters())


@claim
def it_starts_at_zero():
    """A fresh network gives zero for any image: a denoiser that says nothing yet."""
    model = UNet(1, 8, 1)
    assert not model(torch.randn(3, 1, 8, 8), Context()).any()


@claim.parity(peer="diffusers UNet2DModel")
def equals_diffusers():
    """The same random weights give the output of diffusers' network without attention, and its gradients, for images
    that are not square."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    theirs = UNet2DModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=4,
        add_attention=False,
    )
    _random(theirs)
    norm = part(GroupNorm, groups=4)
    units = part(Conditioned, map_norm=norm)
    ours = UNet(2, 8, 32, widths=(8, 16, 24), depth=2, level=units, map_norm=norm).double()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    x, times = torch.randn(3, 2, 8, 12, dtype=torch.float64), torch.tensor([0, 17, 999])
    condition = theirs.time_embedding(theirs.time_proj(times).double())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    a, b = ours(leaves[0], Context(condition=condition)), theirs(leaves[1], times).sample
    torch.testing.assert_close(a, b)
    push = torch.randn_like(a)
    for y in (a, b):
        (y * push).sum().backward(retain_graph=True)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


@claim.measured(paper="the skips let the network localise; 92 % IoU against 83 % of the second best (Table 2)")
def skips_restore_where_things_are(lab):
    """With its skips cut, the same network restores held-out digits from noise with at least 10 % more squared
    error."""
    worse, runs = [], {}
    for seed in lab.seeds(3):
        runs = {"with skips": lab.train("u-net", seed=seed), "cut": lab.train(u_net.fill("skip", cut), seed=seed)}
        worse.append(100 * (runs["cut"].score / runs["with skips"].score - 1))
    figures = {"Six held-out digits: as they are, spoilt, restored with skips and without": lab.figure(_shown(runs))}
    return lab.at_least(worse, 10.0, unit="% of the squared error", figures=figures)


@torch.no_grad()
def _shown(runs: dict):
    from matplotlib.figure import Figure

    images = runs["cut"].task.all().images[:6]
    torch.manual_seed(0)
    spoilt = images + 0.5 * torch.randn_like(images)
    rows = [images, spoilt, *(run.model(spoilt) for run in runs.values())]
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), 6), rows, strict=True):
        for axes, image in zip(line, row[:, 0], strict=True):
            axes.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
            axes.set_axis_off()
    return figure


def _random(model: nn.Module) -> nn.Module:
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model
