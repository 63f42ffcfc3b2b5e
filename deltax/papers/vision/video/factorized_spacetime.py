"""ViViT: A Video Vision Transformer. Arnab, Dehghani, Heigold, Sun, Lučić, Schmid, 2021. arXiv:2103.15691

Attention over all patches of a video, but first within each frame and then along time at each position.

T frames of S patches have (T S)^2 pairs; factorised attention has T S^2 + S T^2, and two layers still connect any two
patches (section 3.3, model 3). A 3-D convolution factorises in the same way (R(2+1)D, Tran et al., 2018,
arXiv:1711.11248). Here the temporal part is causal, as in Cosmos' tokenizer: a causal mask for attention; for
convolutions the past only, padded by the first frame. So an image is a one-frame video, and a video can be encoded
frame by frame. ViViT and R(2+1)D themselves are not causal; `mask` restores that for attention.
"""

from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import needs
from deltax.errors import UserError
from deltax.papers.language.models.transformer import transformer
from deltax.papers.vision.backbones.vit import mean_pooled
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import causal
from deltax.parts.model.videos import Video, preceded
from deltax.shapes import Stream


@needs(context=("grid",), **{"inner": ("Block",), "inner.mixer": ("Attention",), "inner.branches": ("in_turn",)})
class SpaceTimeBlock(nn.Module):
    """A block of three branches: space, time, MLP (Eqs. 4 to 6). Stream (B, T S, D), as in `WithinFrames`.

    `inner` is the block it replaces: its mixer is used within frames as it is, and along time with `mask`.
    """

    def __init__(self, dim: int, *, inner: Part, mask: Part = part(causal)):
        super().__init__()
        mixer = inner["mixer"]
        self.space_residual = inner["residual"](dim)
        self.space = WithinFrames(dim, inner=mixer)
        # the replaced block itself, its attention now along time
        self.rest = part(inner, mixer=part(AlongTime, inner=part(mixer, mask=mask)))(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        # Eqs. 4 to 6: space attention, time attention, MLP
        return self.rest(self.space_residual(x, lambda x: self.space(x, ctx)), ctx)


@paper(on=transformer, year=2021, arxiv="2103.15691", whole="vit+vitok")
def factorized_spacetime(recipe: Part, *, mask: Part = part(causal)) -> Part:
    return mean_pooled(recipe).wrap("block", SpaceTimeBlock, mask=mask)


class WithinFrames(nn.Module):
    """`inner` on each frame. Stream (B, T S, D) in frame order, ctx.grid is a frame's rows and columns.

    Patches keep their positions in the whole stream. Segments and vectors of places are refused.
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "segments", "place")
        at = _by_frame(ctx.where(x).expand(x.shape[:2]), ctx)
        frames = _by_frame(x, ctx)  # (B, T, S, D); S attends
        return self.inner(frames.flatten(0, 1), Context(positions=at.flatten(0, 1))).view_as(x)


class AlongTime(nn.Module):
    """`inner` along time at each position of a frame. Stream (B, T S, D), as in `WithinFrames`.

    With a decoding state it takes one or more frames at a time.
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "segments", "place")
        at = _by_frame(ctx.where(x).expand(x.shape[:2]), ctx).mT
        tracks = _by_frame(x, ctx).transpose(1, 2)  # (B, S, T, D); T attends
        told = Context(positions=at.flatten(0, 1), state=ctx.state)
        return self.inner(tracks.flatten(0, 1), told).view_as(tracks).transpose(1, 2).flatten(1, 2)


def _by_frame(x: Tensor, ctx: Context) -> Tensor:
    """(B, T S, ...) -> (B, T, S, ...)."""
    if ctx.grid is None:
        raise UserError(
            "ctx.grid is None, so the frames of the stream are unknown: give Context(grid=(rows, columns)) of a frame"
        )
    places = ctx.grid[0] * ctx.grid[1]
    if x.shape[1] % places:
        raise UserError(
            f"a stream of {x.shape[1]} is no multiple of {places} patches: set ctx.grid to a frame's rows and columns"
        )
    return x.unflatten(1, (-1, places))


class PlaneConv(nn.Conv3d):
    """A size x size convolution of each frame, zero-padded. (B, C, T, Y, X) -> (B, D, T, Y, X)."""

    def __init__(self, channels: int, out: int, *, size: int = 3):
        # 1 x k x k
        super().__init__(channels, out, (1, size, size), padding=(0, size // 2, size // 2))


class PastConv(nn.Conv3d):
    """A causal convolution along time over `length` frames, padded by the first frame. (B, C, T, Y, X) -> (B, D,
    ceil(T / stride), Y, X)."""

    def __init__(self, channels: int, out: int, *, length: int = 3, stride: int = 1):
        # k x 1 x 1
        super().__init__(channels, out, (length, 1, 1), stride=(stride, 1, 1))

    def forward(self, x: Video) -> Video:
        return super().forward(preceded(x, self.kernel_size[0] - 1))


class FactorizedConv(nn.Sequential):
    """A convolution of each frame, then a causal one along time. (B, C, T, Y, X) -> (B, D, T, Y, X)."""

    def __init__(self, channels: int, out: int, *, size: int = 3, length: int = 3):
        super().__init__(PlaneConv(channels, out, size=size), PastConv(out, out, length=length))
