"""ViViT: A Video Vision Transformer. Arnab, Dehghani, Heigold, Sun, Lučić, Schmid, 2021. arXiv:2103.15691

Attention over all patches of a video, but first within each frame and then along time at each place.

T frames of S patches have (T S)^2 pairs; frame by frame and then place by place there are T S^2 + S T^2, and whatever
two patches have to say to each other still arrives in two steps (ViViT's model 3). A 3-D convolution splits the same
way, in a plane and along time (R(2+1)D, Tran et al., 2018, arXiv:1711.11248). Along time nothing looks ahead here, as
in Cosmos's tokenizer: attention under a causal mask, convolution over the past alone, the first frame standing for what
was before it. So a picture is a video of one frame, and a video can be read as it comes. ViViT and R(2+1)D themselves
look both ways, which `mask` gives back for attention.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.errors import UserError
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.vision.vit import mean_pooled, vit
from deltax.parts.context import Context
from deltax.parts.scores import causal
from deltax.shapes import Stream

Video = Float[Tensor, "B _ _ Y X"]


def causally_padded(x: Video, frames: int) -> Video:
    """The first frame, `frames` times more, before the video (B, C, T, Y, X)."""
    return torch.cat([x[:, :, :1].expand(-1, -1, frames, -1, -1), x], 2)


class FactorizedConv(nn.Module):
    """A convolution of each frame, size x size, then one along time over the past. (B, C, T, Y, X) -> (B, D, T, Y, X).

    Weights as PyTorch starts them; frames are padded with zeros at their borders.
    """

    def __init__(self, channels: int, out: int, *, size: int = 3, length: int = 3):
        super().__init__()
        self.space = nn.Conv3d(channels, out, (1, size, size), padding=(0, size // 2, size // 2))
        self.time = nn.Conv3d(out, out, (length, 1, 1))
        self.past = length - 1

    def forward(self, x: Video) -> Video:
        return self.time(causally_padded(self.space(x), self.past))


class SpaceTime(nn.Module):
    """`inner` within each frame, then, as what space has said is added, along time at each place. (B, T S, D), the same.

    The stream goes frame by frame; ctx.grid has the rows and columns of one. What is returned is for the residual to
    add: what both have said.
    """

    def __init__(self, dim: int, *, inner: Part = part(Attention), mask: Part = part(causal)):
        super().__init__()
        self.space, self.time = inner(dim), part(inner, mask=mask)(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        if ctx.grid is None:
            raise UserError("a stream is no video without its grid: give Context(grid=(rows, columns)) of a frame")
        places = ctx.grid[0] * ctx.grid[1]
        if x.shape[1] % places:
            raise UserError(f"a stream of {x.shape[1]} is not made of frames of {places} patches: mend ctx.grid")
        frames = x.unflatten(1, (-1, places))
        inner = Context()
        said = self.space(frames.flatten(0, 1), inner).view_as(frames)
        tracks = (frames + said).transpose(1, 2)
        moved = self.time(tracks.flatten(0, 1), inner).view_as(tracks)
        return (said + moved.transpose(1, 2)).flatten(1, 2)


@paper(on=vit, year=2021, arxiv="2103.15691")
def factorized_spacetime(recipe: Part, *, mask: Part = part(causal)) -> Part:
    return mean_pooled(recipe).wrap("mixer", SpaceTime, mask=mask)


@claim
def no_frame_waits_for_a_later_one():
    """Changing later frames changes no earlier output, of the convolution as of attention, and changing an earlier one
    changes all that follow."""
    for layer, video in _layers():
        out = layer(video)
        later = torch.cat([video[:, :, :2], torch.randn_like(video[:, :, 2:])], 2)
        torch.testing.assert_close(layer(later)[:, :, :2], out[:, :, :2])
        earlier = torch.cat([video[:, :, :1] + 1, video[:, :, 1:]], 2)
        change = (layer(earlier) - out).abs().amax((0, 1, 3, 4))
        assert (change > 1e-4).all()


@claim
def a_picture_is_a_video_of_one_frame():
    """The first frame of a video comes out as it does alone, which is what the plane's half makes of a picture and a
    linear map of it, with gradients."""
    for layer, video in _layers():
        video.requires_grad_()
        out, alone = layer(video)[:, :, :1], layer(video[:, :, :1])
        torch.testing.assert_close(out, alone)
        weight = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), video)[0] for y in (out, alone)))
    conv, video = next(_layers())
    plane = nn.functional.conv2d(video[:, :, 0], conv.space.weight[:, :, 0], conv.space.bias, padding=1)
    mapped = torch.einsum("bcyx,dc->bdyx", plane, conv.time.weight.sum((2, 3, 4))) + conv.time.bias[:, None, None]
    torch.testing.assert_close(conv(video[:, :, :1])[:, :, 0], mapped)


@claim
def space_and_time_ask_less():
    """A video of T frames of S patches makes T S^2 + S T^2 products of query and key in each head, where attention over
    all makes (T S)^2; and still a change in any patch of the first frame reaches every patch of the last."""
    layer, counted, time, grid = _attention(), [], 5, (2, 3)

    def counting(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        counted.append(q.shape[0] * q.shape[1] * k.shape[1])
        return attend(q, k, v, rules)

    layer.space.kernel = layer.time.kernel = counting
    places = grid[0] * grid[1]
    x = torch.randn(1, time * places, 6, dtype=torch.float64)
    out = layer(x, Context(grid=grid))
    assert sum(counted) == time * places**2 + places * time**2 < (time * places) ** 2
    for place in range(places):
        other = x.clone()
        other[:, place] += 1
        change = (layer(other, Context(grid=grid)) - out)[:, -places:].abs().amax((0, 2))
        assert (change > 1e-9).all()


@claim
def looking_both_ways_it_has_no_direction():
    """Under the mask of ViViT, which looks both ways, a video played backwards comes out backwards; under the causal
    one it does not."""
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for mask, same in ((everywhere, True), (causal, False)):
        layer = _attention(mask)
        told = lambda x, layer=layer: layer(x.flatten(1, 2), Context(grid=(2, 3))).unflatten(1, (4, 6))
        assert torch.allclose(told(x.flip(1)), told(x).flip(1)) == same


def _attention(mask: Any = causal) -> nn.Module:
    return randomise(SpaceTime(6, inner=part(Attention, heads=2), mask=part(mask)))


def _layers() -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The convolution and the attention, each as a map of videos, and a video."""
    yield randomise(FactorizedConv(6, 6)), torch.randn(2, 6, 4, 2, 3, dtype=torch.float64)
    layer = _attention()

    def attending(video: Tensor) -> Tensor:
        stream = video.flatten(2).mT
        return layer(stream, Context(grid=(2, 3))).mT.unflatten(2, video.shape[2:])

    yield attending, torch.randn(2, 6, 4, 2, 3, dtype=torch.float64)
