"""Claims of factorized-spacetime: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.claims.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.papers.language.attention.softmax_attention import Attention, attend
from deltax.papers.language.position.rope import Rotary
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.video.factorized_spacetime import AlongTime, FactorizedConv, SpaceTimeBlock, WithinFrames
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.scores import Rules, causal, everywhere
from deltax.parts.model.identity import Identity
from deltax.parts.model.mlp import MLP
from deltax.parts.model.stack import Block, PreNorm
from deltax.parts.model.videos import as_maps, as_stream, preceded


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
    block.rest.mixer = Identity()
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
