"""Cosmos World Foundation Model Platform for Physical AI, section 4: its tokenizer. NVIDIA, 2025. arXiv:2501.03575

A video autoencoder, but it starts from wavelets, convolves and attends in space and then over the past alone, and its
latent is plain or rounded.

Everything that looks along time looks back, and the first frame stands for what was before it. So the latent of the
first frame is what its picture gives alone, one tokenizer serves both, and a video is encoded as it comes. The latent
is 16 channels of a plain autoencoder, with no penalty, or six rounded by FSQ: `cosmos_tokenizer + fsq`. Channels are
normed within each frame. Halving adds a strided convolution to a mean, doubling a convolution to a repetition. The
paper learns with an L1 and a perceptual loss, then losses on optical flow and Gram matrices, then an adversary; here
it is the squared error, since under the L1 a small digit on a dark field is long not worth drawing (`absolute` gives
it back). Released widths are 128, 256, 512, 512 for the encoder, with two units a level, and one halving or two after
wavelets of two levels; the default here halves no more and makes 192 numbers of a video of 9 x 16 x 16.
"""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from deltax import Part, paper, part
from deltax.errors import UserError
from deltax.papers.generative.fsq import fsq
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.video.factorized_spacetime import (
    AlongTime,
    FactorizedConv,
    PastConv,
    PlaneConv,
    WithinFrames,
    factorized_spacetime,
)
from deltax.papers.vision.video.haar_wavelet_tokenizer import Haar, haar_wavelet_tokenizer
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal
from deltax.parts.model.autoencoder import Autoencoder, NoBottleneck, rebuild
from deltax.parts.model.videos import Video, as_maps, as_stream, preceded
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.tasks.images.videos import MovingDigits

Factors = tuple[tuple[int, int], ...]  # how many times fewer frames, and rows and columns; each 1 or 2


class FrameNorm(nn.GroupNorm):
    """Each frame standardised over all its channels and places; a gain and a bias a channel. (B, C, T, Y, X)."""

    def __init__(self, channels: int):
        super().__init__(1, channels, eps=1e-6)

    def forward(self, x: Video) -> Video:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Unit(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), factorised and causal. (B, C, T, Y, X) -> (B, D, T, Y, X)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(channels), FactorizedConv(channels, out)
        self.norm2, self.conv2 = FrameNorm(out), FactorizedConv(out, out)
        self.shortcut = nn.Identity() if channels == out else PlaneConv(channels, out, size=1)

    def forward(self, x: Video) -> Video:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(hidden)))


class Attentive(nn.Module):
    """Attention within each frame, then at each place over the past, each added to what it was given normed."""

    def __init__(self, channels: int, *, mixer: Part):
        super().__init__()
        self.space_norm, self.space = FrameNorm(channels), WithinFrames(channels, inner=mixer)
        self.time_norm, self.time = FrameNorm(channels), AlongTime(channels, inner=part(mixer, mask=part(causal)))

    def forward(self, x: Video) -> Video:
        space, ctx = tuple(x.shape[2:]), Context(grid=tuple(x.shape[3:]))
        x = x + as_maps(self.space(as_stream(self.space_norm(x)), ctx), space)
        return x + as_maps(self.time(as_stream(self.time_norm(x)), ctx), space)


class Level(nn.Module):
    """`units` units at one resolution, the first `attentive` of them each with attention behind it."""

    def __init__(self, channels: int, out: int, *, units: int, attentive: int, mixer: Part):
        super().__init__()
        self.units = nn.ModuleList(Unit(out if i else channels, out) for i in range(units))
        self.attention = nn.ModuleList(Attentive(out, mixer=mixer) for _ in range(attentive))

    def forward(self, x: Video) -> Video:
        for i, unit in enumerate(self.units):
            x = unit(x)
            if i < len(self.attention):
                x = self.attention[i](x)
        return x


class HalfPlane(nn.Conv3d):
    """Half the rows and columns: a strided 3 x 3 convolution and the mean of 2 x 2, added."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Video) -> Video:
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return super().forward(x) + nn.functional.avg_pool3d(x, (1, 2, 2))


class HalfTime(PastConv):
    """1 + 2 k frames as 1 + k: a strided convolution over the past and the mean of two frames, added."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, stride=2)

    def forward(self, x: Video) -> Video:
        return super().forward(x) + nn.functional.avg_pool3d(preceded(x, 1), (2, 1, 1))


class TwicePlane(PlaneConv):
    """Twice the rows and columns: each repeated, and a convolution of that added."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Video) -> Video:
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return super().forward(x) + x


class TwiceTime(PastConv):
    """1 + k frames as 1 + 2 k: each but the first repeated, and a convolution over the past of that added."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Video) -> Video:
        x = x.repeat_interleave(2, 2)[:, :, 1:]
        return super().forward(x) + x


def shrinking(channels: int, factors: tuple[int, int]) -> nn.Sequential:
    """Fewer rows and columns, then frames, then a linear map; nothing where both factors are 1."""
    time, plane = factors
    halves = [("plane", HalfPlane(channels))] * (plane == 2) + [("time", HalfTime(channels))] * (time == 2)
    return _with_point(channels, halves)


def growing(channels: int, factors: tuple[int, int]) -> nn.Sequential:
    """More frames, then rows and columns, then a linear map; nothing where both factors are 1."""
    time, plane = factors
    doubles = [("time", TwiceTime(channels))] * (time == 2) + [("plane", TwicePlane(channels))] * (plane == 2)
    return _with_point(channels, doubles)


def _with_point(channels: int, steps: list[tuple[str, nn.Module]]) -> nn.Sequential:
    point = [("point", PlaneConv(channels, channels, size=1))] * bool(steps)
    return nn.Sequential(OrderedDict(steps + point))


class CosmosEncoder(nn.Module):
    """patcher -> levels, each but the last followed by its factors -> latent. (B, C, 1 + k t, Y, X) ->
    (B, out, 1 + k, Y / s, X / s), t and s the products of all factors and the patch.

    Level i goes from widths[i] to widths[i + 1]; `attentive` names those with attention. Raises UserError for videos
    that do not divide so.
    """

    can_be_zero = ("depth",)

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        widths: tuple[int, ...] = (32, 32),
        depth: int = 1,
        factors: Factors = (),
        attentive: tuple[int, ...] = (),
        patcher: Part = part(Haar),
        mixer: Part = part(Attention, heads=1),
    ):
        super().__init__()
        self.patcher = patcher()
        self.patch = _patch(self.patcher.patch, factors, widths)
        self.enter = FactorizedConv(channels * self.patcher.patch**3, widths[0])
        self.levels, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, (width, wide) in enumerate(pairwise(widths)):
            count = depth if i in attentive else 0
            self.levels.append(Level(width, wide, units=depth, attentive=count, mixer=mixer))
            self.shrink.append(shrinking(wide, factors[i] if i < len(factors) else (1, 1)))
        self.middle = Level(wide, wide, units=2, attentive=1, mixer=mixer)
        self.norm, self.leave = FrameNorm(wide), FactorizedConv(wide, out)
        self.point = PlaneConv(out, out, size=1)

    def forward(self, video: Video) -> Video:
        time, plane = self.patch
        frames, rows, columns = video.shape[2:]
        if (frames - 1) % time or rows % plane or columns % plane:
            raise UserError(
                f"a video of {frames} x {rows} x {columns} does not become a latent: cut or pad it to 1 + a multiple "
                f"of {time} frames, and rows and columns to multiples of {plane}"
            )
        x = self.enter(self.patcher.cut(video))
        for level, shrink in zip(self.levels, self.shrink, strict=True):
            x = shrink(level(x))
        return self.point(self.leave(nn.functional.silu(self.norm(self.middle(x)))))


class CosmosDecoder(nn.Module):
    """The encoder in a mirror, with one unit more at each level. (B, latent, 1 + k, Y, X) -> (B, C, 1 + k t, s Y, s X).

    Widths, factors and levels with attention are given as to the encoder.
    """

    can_be_zero = ("depth",)

    def __init__(
        self,
        latent: int,
        channels: int,
        *,
        widths: tuple[int, ...] = (32, 32),
        depth: int = 1,
        factors: Factors = (),
        attentive: tuple[int, ...] = (),
        patcher: Part = part(Haar),
        mixer: Part = part(Attention, heads=1),
    ):
        super().__init__()
        self.patcher = patcher()
        _patch(self.patcher.patch, factors, widths)
        wide, levels = widths[-1], len(widths) - 1
        self.point = PlaneConv(latent, latent, size=1)
        self.enter = FactorizedConv(latent, wide)
        self.middle = Level(wide, wide, units=2, attentive=1, mixer=mixer)
        self.levels, self.grow = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(levels)):
            count = depth + 1 if i in attentive else 0
            self.levels.append(Level(wide, widths[i], units=depth + 1, attentive=count, mixer=mixer))
            self.grow.append(growing(widths[i], factors[i - 1] if 0 < i <= len(factors) else (1, 1)))
            wide = widths[i]
        self.norm, self.leave = FrameNorm(wide), FactorizedConv(wide, channels * self.patcher.patch**3)

    def forward(self, latent: Video) -> Video:
        x = self.middle(self.enter(self.point(latent)))
        for level, grow in zip(self.levels, self.grow, strict=True):
            x = grow(level(x))
        return self.patcher.join(self.leave(nn.functional.silu(self.norm(x))))


def _patch(patch: int, factors: Factors, widths: tuple[int, ...]) -> tuple[int, int]:
    """How many frames, and how many rows and columns, make one of the latent."""
    if len(widths) < len(factors) + 2 or any(factor not in (1, 2) for pair in factors for factor in pair):
        raise UserError(
            f"{len(factors)} factors take at least {len(factors) + 2} widths, not {len(widths)}, and each is a pair of "
            f"1 or 2: how many times fewer frames, and rows and columns"
        )
    time, plane = patch, patch
    for fewer, smaller in factors:
        time, plane = time * fewer, plane * smaller
    return time, plane


@paper(on=(haar_wavelet_tokenizer, factorized_spacetime, fsq), year=2025, arxiv="2501.03575")
def cosmos_tokenizer(*, width: int = 4, levels: int = 2) -> Part:
    patcher = part(Haar, levels=levels)
    return part(
        Run,
        model=part(
            Autoencoder,
            encoder=part(CosmosEncoder, patcher=patcher),
            bottleneck=part(NoBottleneck, width=width),
            decoder=part(CosmosDecoder, patcher=patcher),
        ),
        task=MovingDigits,
        objective=part(rebuild, of="videos"),
        batches=from_task,
        optimizer=part(adamw, lr=3e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=700),
    )
