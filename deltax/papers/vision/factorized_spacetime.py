"""ViViT: A Video Vision Transformer. Arnab, Dehghani, Heigold, Sun, Lučić, Schmid, 2021. arXiv:2103.15691

Attention over all patches of a video, but first within each frame and then along time at each place.

T frames of S patches have (T S)^2 pairs; frame by frame and then place by place there are T S^2 + S T^2, and whatever
two patches have to say to each other still arrives in two steps (section 3.3, model 3). A 3-D convolution splits the
same way, in a plane and along time (R(2+1)D, Tran et al., 2018, arXiv:1711.11248). Along time nothing looks ahead here,
as in Cosmos's tokenizer: attention under a causal mask, convolution over the past alone, the first frame standing for
what was before it. So a picture is a video of one frame, and a video can be read as it comes. ViViT and R(2+1)D
themselves look both ways, which `mask` gives back for attention.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.language.rope import Rotary
from deltax.papers.language.softmax_attention import Attention, attend
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.vision.vit import mean_pooled, vit
from deltax.parts.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.parts.context import Context, DecodingState
from deltax.parts.mlp import MLP
from deltax.parts.nothing import Nothing
from deltax.parts.scores import Rules, causal, everywhere
from deltax.parts.stack import Block, PreNorm
from deltax.parts.videos import Video, as_maps, as_stream, preceded
from deltax.shapes import Stream


class PlaneConv(nn.Conv3d):
    """A convolution of each frame, size x size, zeros around it. (B, C, T, Y, X) -> (B, D, T, Y, X)."""

    def __init__(self, channels: int, out: int, *, size: int = 3):
        super().__init__(channels, out, (1, size, size), padding=(0, size // 2, size // 2))


class PastConv(nn.Conv3d):
    """A convolution along time over a frame and the length - 1 before it, the first frame standing for those that are
    not there. (B, C, T, Y, X) -> (B, D, ceil(T / stride), Y, X)."""

    def __init__(self, channels: int, out: int, *, length: int = 3, stride: int = 1):
        super().__init__(channels, out, (length, 1, 1), stride=(stride, 1, 1))

    def forward(self, x: Video) -> Video:
        return super().forward(preceded(x, self.kernel_size[0] - 1))


class FactorizedConv(nn.Sequential):
    """A convolution of each frame, then one along time over the past. (B, C, T, Y, X) -> (B, D, T, Y, X)."""

    def __init__(self, channels: int, out: int, *, size: int = 3, length: int = 3):
        super().__init__(PlaneConv(channels, out, size=size), PastConv(out, out, length=length))


class WithinFrames(nn.Module):
    """`inner` on each frame by itself. Stream (B, T S, D), frame by frame, ctx.grid a frame's rows and columns.

    Positions are those that the patches have in the stream. Of the rest of ctx nothing is passed on.
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        at = _by_frame(ctx.where(x).expand(x.shape[:2]), ctx)
        frames = _by_frame(x, ctx)
        return self.inner(frames.flatten(0, 1), Context(positions=at.flatten(0, 1))).view_as(x)


class AlongTime(nn.Module):
    """`inner` at each place of a frame by itself, over time. Stream (B, T S, D), as `WithinFrames`.

    Under a decoding state it takes one frame or more at a time.
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        at = _by_frame(ctx.where(x).expand(x.shape[:2]), ctx).mT
        tracks = _by_frame(x, ctx).transpose(1, 2)
        told = Context(positions=at.flatten(0, 1), state=ctx.state)
        return self.inner(tracks.flatten(0, 1), told).view_as(tracks).transpose(1, 2).flatten(1, 2)


@needs(context=("grid",), **{"inner": ("Block",), "inner.mixer": ("Attention",), "inner.branches": ("in_turn",)})
class SpaceTimeBlock(nn.Module):
    """A block of three branches: space, time, MLP (Eqs. 4 to 6). Stream (B, T S, D), as `WithinFrames`.

    `inner` is the block that it replaces: its mixer serves within frames as it is and along time under `mask`.
    """

    def __init__(self, dim: int, *, inner: Part, mask: Part = part(causal)):
        super().__init__()
        mixer = inner["mixer"]
        self.space_residual = inner["residual"](dim)
        self.space = WithinFrames(dim, inner=mixer)
        self.rest = part(inner, mixer=part(AlongTime, inner=part(mixer, mask=mask)))(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.rest(self.space_residual(x, lambda x: self.space(x, ctx)), ctx)


def _by_frame(x: Tensor, ctx: Context) -> Tensor:
    """(B, T S, ...) -> (B, T, S, ...)."""
    if ctx.grid is None:
        raise UserError("a stream is no video without its grid: give Context(grid=(rows, columns)) of a frame")
    places = ctx.grid[0] * ctx.grid[1]
    if x.shape[1] % places:
        raise UserError(f"a stream of {x.shape[1]} is not made of frames of {places} patches: mend ctx.grid")
    return x.unflatten(1, (-1, places))


@paper(on=vit, year=2021, arxiv="2103.15691", whole="vit+vitok")
def factorized_spacetime(recipe: Part, *, mask: Part = part(causal)) -> Part:
    return mean_pooled(recipe).wrap("block", SpaceTimeBlock, mask=mask)


@claim
def no_frame_waits_for_a_later_one():
    """Changing later frames changes no earlier output, of the convolution as of the block, and changing the first one
    changes all that follow."""
    for layer, video in _layers():
        out = layer(video)
        later = torch.cat([video[:, :, :2], torch.randn_like(video[:, :, 2:])], 2)
        torch.testing.assert_close(layer(later)[:, :, :2], out[:, :, :2])
        earlier = torch.cat([torch.randn_like(video[:, :, :1]), video[:, :, 1:]], 2)
        change = (layer(earlier) - out).abs().amax((0, 1, 3, 4))
        assert (change > 1e-4).all()


@claim
def a_picture_is_a_video_of_one_frame():
    """The first frame of a video comes out as it does alone, with gradients; and the convolution makes of it the
    plane's convolution of a picture and a linear map."""
    for layer, video in _layers():
        video.requires_grad_()
        out, alone = layer(video)[:, :, :1], layer(video[:, :, :1])
        torch.testing.assert_close(out, alone)
        weight = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), video)[0] for y in (out, alone)))
    conv, video = next(_layers())
    space, time = conv
    plane = nn.functional.conv2d(video[:, :, 0], space.weight[:, :, 0], space.bias, padding=1)
    mapped = torch.einsum("bcyx,dc->bdyx", plane, time.weight.sum((2, 3, 4))) + time.bias[:, None, None]
    torch.testing.assert_close(conv(video[:, :, :1])[:, :, 0], mapped)


@claim
def two_convolutions_are_one_of_rank_one_in_time():
    """Without bias between them the plane's convolution and that along time are one 3-D convolution, whose weight is
    the product of theirs, of a video that its first frame precedes; with the gradients of both."""
    conv, video = next(_layers())
    space, time = conv
    space.bias.data.zero_()
    space.bias.requires_grad_(False)
    whole = torch.einsum("mcyx,dmt->dctyx", space.weight[:, :, 0], time.weight[..., 0, 0])
    joint = nn.functional.conv3d(preceded(video, 3), whole, time.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv(video), joint)
    weight, learned = torch.randn_like(joint), [space.weight, time.weight]
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), learned) for y in (conv(video), joint))):
        torch.testing.assert_close(ours, theirs)


@claim
def each_half_is_joint_attention_under_a_mask():
    """Within frames is attention over the whole video whose mask lets a patch see its own frame, and along time the
    one whose mask lets it see its own place up to now, with rotary positions of the whole stream and all gradients."""
    places = 6

    def same_frame(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // places == k // places

    def same_place(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q % places == k % places) & (q >= k)

    inner = part(Attention, heads=3, qk_position=part(Rotary))
    x = torch.randn(2, 4 * places, 12, dtype=torch.float64)
    halves = ((WithinFrames, inner, same_frame), (AlongTime, part(inner, mask=part(causal)), same_place))
    for half, mixer, mask in halves:
        ours, joint = half(12, inner=mixer), inner(12)
        joint.mask = mask
        randomise(ours)
        joint.double().load_state_dict(ours.inner.state_dict())
        ctx = Context(grid=(2, 3))
        same_gradients(ours(x, ctx), joint(x, ctx))
        assert_equal(gradients(ours.inner), gradients(joint))


@claim
def space_and_time_ask_less():
    """A video of T frames of S patches makes T S^2 + S T^2 products of query and key in each head, where attention over
    all makes (T S)^2; and still a change in any patch of the first frame reaches every patch of the last."""
    block, counted, time, grid = _block(), [], 5, (2, 3)

    def counting(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        counted.append(q.shape[0] * q.shape[1] * k.shape[1])
        return attend(q, k, v, rules)

    block.space.inner.kernel = block.rest.mixer.inner.kernel = counting
    places = grid[0] * grid[1]
    x = torch.randn(1, time * places, 8, dtype=torch.float64)
    out = block(x, Context(grid=grid))
    assert sum(counted) == time * places**2 + places * time**2 < (time * places) ** 2
    for place in range(places):
        other = x.clone()
        other[:, place] += torch.randn(8, dtype=torch.float64)
        change = (block(other, Context(grid=grid)) - out)[:, -places:].abs().amax((0, 2))
        assert (change > 1e-9).all()


@claim
def frame_by_frame_it_is_the_same():
    """Fed one frame at a time, remembering what each place has said, the block gives what it gives for the video."""
    block, grid = _block(qk_position=part(Rotary)), (2, 3)
    x = torch.randn(2, 5 * 6, 8, dtype=torch.float64)
    state, told = DecodingState(), []
    for frame in x.split(6, 1):
        told.append(block(frame, Context(grid=grid, state=state)))
        state.seen += frame.shape[1]
    torch.testing.assert_close(torch.cat(told, 1), block(x, Context(grid=grid)))


@claim
def looking_both_ways_it_has_no_direction():
    """Under the mask of ViViT, which looks both ways, a video played backwards comes out backwards; under the causal
    one it does not."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    for mask, same in ((everywhere, True), (causal, False)):
        block = _block(mask)
        told = lambda x, block=block: block(x.flatten(1, 2), Context(grid=(2, 3))).unflatten(1, (4, 6))
        assert torch.allclose(told(x.flip(1)), told(x).flip(1)) == same


@claim
def with_nothing_said_along_time_each_frame_is_a_picture():
    """With the branch along time left empty the block is the one it replaced, on each frame."""
    block = _block()
    block.rest.mixer = Nothing()
    block.rest.mixer_residual = _Skipped()
    plain = _plain(8).double()
    plain.load_state_dict(
        {
            **{f"mixer.{k}": v for k, v in block.space.inner.state_dict().items()},
            **{f"mixer_residual.{k}": v for k, v in block.space_residual.state_dict().items()},
            **{k: v for k, v in block.rest.state_dict().items() if k.startswith("mlp")},
        }
    )
    x = torch.randn(2, 4 * 6, 8, dtype=torch.float64)
    frames = plain(x.unflatten(1, (4, 6)).flatten(0, 1), Context())
    torch.testing.assert_close(block(x, Context(grid=(2, 3))), frames.view_as(x))


@claim.measured(paper="variants that factorise space and time are efficient where all attend to all (abstract)")
def space_and_time_cost_less(lab):
    """Over 8 frames of 64 patches, 64 features wide, reference attention among all patches takes forward and backward
    at least 1.9 times as long as attention within frames and then along time: with all four projections of each, a
    patch costs 81,920 products jointly and 41,984 factorised, so the count promises 1.95.

    The projections, twice as many, eat most of what the pairs save, of which there are 7.1 times fewer. The threshold
    was written down before anything was timed.
    """
    frames, grid, dim = 8, (8, 8), 64
    places = grid[0] * grid[1]
    products = {"joint": (4 * dim + 2 * frames * places) * dim, "factorised": (8 * dim + 2 * (places + frames)) * dim}
    space = WithinFrames(dim, inner=part(Attention, heads=4))
    time = AlongTime(dim, inner=part(Attention, heads=4, mask=part(causal)))
    joint = Attention(dim, heads=4)
    x, ctx = torch.randn(2, frames * places, dim), Context(grid=grid)
    found = lab.ratio(lambda: time(space(x, ctx), ctx).sum().backward(), lambda: joint(x, ctx).sum().backward())
    numbers = {"products a patch": products, "their ratio": products["joint"] / products["factorised"]}
    return lab.verdict(faster(found, 1.9), estimate=found.value, interval=found, unit="times the time", numbers=numbers)


class _Skipped(nn.Module):
    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x


_plain = part(Block, mixer=part(Attention, heads=2), mlp=MLP, residual=part(PreNorm, norm=LayerNorm))


def _block(mask: Any = causal, **attention: Any) -> nn.Module:
    inner = _plain.set(Attention, **attention) if attention else _plain
    return randomise(SpaceTimeBlock(8, inner=inner, mask=part(mask)))


def _layers() -> Iterator[tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]]:
    """The convolution and the block, each as a map of videos, and a video."""
    yield randomise(FactorizedConv(8, 8, length=4)), torch.randn(2, 8, 4, 2, 3, dtype=torch.float64)
    block = _block()

    def attending(video: Tensor) -> Tensor:
        return as_maps(block(as_stream(video), Context(grid=(2, 3))), tuple(video.shape[2:]))

    yield attending, torch.randn(2, 8, 4, 2, 3, dtype=torch.float64)
