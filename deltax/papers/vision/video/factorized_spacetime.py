"""ViViT: A Video Vision Transformer. Arnab, Dehghani, Heigold, Sun, Lučić, Schmid, 2021. arXiv:2103.15691

Attention over all patches of a video, but first within each frame and then along time at each place.

T frames of S patches have (T S)^2 pairs; frame by frame and then place by place there are T S^2 + S T^2, and whatever
two patches have to say to each other still arrives in two steps (section 3.3, model 3). A 3-D convolution splits the
same way, in a plane and along time (R(2+1)D, Tran et al., 2018, arXiv:1711.11248). Along time nothing looks ahead here,
as in Cosmos's tokenizer: attention under a causal mask, convolution over the past alone, the first frame standing for
what was before it. So a picture is a video of one frame, and a video can be read as it comes. ViViT and R(2+1)D
themselves look both ways, which `mask` gives back for attention.
"""

from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.vision.backbones.vit import mean_pooled, vit
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal
from deltax.parts.model.videos import Video, preceded
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

    Positions are those that the patches have in the stream. Segments and vectors of places are refused.
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "segments", "place")
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
        ctx.refuse(self, "segments", "place")
        at = _by_frame(ctx.where(x).expand(x.shape[:2]), ctx).mT
        tracks = _by_frame(x, ctx).transpose(1, 2)
        told = Context(positions=at.flatten(0, 1), state=ctx.state)
        return self.inner(tracks.flatten(0, 1), told).view_as(tracks).transpose(1, 2).flatten(1, 2)


@needs(
    context=("grid",),
    **{"inner": ("Block",), "inner.mixer": ("Attention",), "inner.branches": ("sequential_branches",)},
)
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
