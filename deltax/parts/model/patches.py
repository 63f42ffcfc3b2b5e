"""Images as streams: cut into patches, placed on a grid, summed up again; the frame that vision transformers share.

A patch stream (B, T, D) goes row by row over a grid of (rows, columns).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax.contract import IMAGES_TO_LOGITS
from deltax.errors import UserError
from deltax.parts.attention.context import Context
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import Linear
from deltax.parts.training.roles import tag
from deltax.recipe import Part, part
from deltax.shapes import Images, Stream

Grid = tuple[int, int]  # rows, columns
Pooled = Float[Tensor, "B D"]


def pair(size: int | Grid) -> Grid:
    """(rows, columns) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patchify(images: Images, patch: int) -> Float[Tensor, "B T F"]:
    """Squares of patch x patch pixels, each one vector in the order channel, row, column, F = C patch patch."""
    cut = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Float[Tensor, "B T F"], patch: int, grid: Grid) -> Images:
    """The images that `patchify` cut into a grid of patches."""
    cut = patches.unflatten(1, grid).unflatten(-1, (-1, patch, patch))
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Patches(nn.Module):
    """A linear map of each patch. Images (B, C, Y, X) -> stream (B, T, D).

    It is a convolution of stride `patch`, whose weight (D, C, patch, patch) is `embed.weight` (D, C patch patch).
    `raster` says that patches go row by row.
    """

    raster = True

    def __init__(self, channels: int, dim: int, *, patch: int = 2, embed: Part = part(Linear)):
        super().__init__()
        self.patch = patch
        self.embed = embed(channels * patch**2, dim)

    def grid(self, size: int | Grid) -> Grid:
        """Rows and columns of patches in an image of this size. Raises UserError where they do not fill it."""
        rows, columns = pair(size)
        if rows % self.patch or columns % self.patch:
            raise UserError(
                f"an image of {rows} x {columns} pixels is not made of patches of {self.patch} x {self.patch}; "
                f"set patch to a divisor of both"
            )
        return rows // self.patch, columns // self.patch

    def forward(self, images: Images) -> Stream:
        return self.embed(patchify(images, self.patch))


class ClassToken(nn.Module):
    """Puts one learned vector before the patches. Stream (B, T, D) -> (B, 1 + T, D).

    A position for it would be a second vector added to the first, so it has none.
    """

    count = 1

    def __init__(self, dim: int, *, std: float = 0.02):
        super().__init__()
        self.std = std
        self.token = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token, std=self.std)

    def forward(self, x: Stream) -> Float[Tensor, "B T+1 D"]:
        return torch.cat([self.token.expand(len(x), 1, -1), x], 1)


class NoClassToken(Identity):
    """Leaves the patches alone."""

    count = 0


class LearnedGrid(nn.Module):
    """Adds a learned vector for each patch; those at ctx.positions (B, T) where given, else all. (B, T, D), the same.

    table (rows * columns, D)
    """

    def __init__(self, dim: int, grid: Grid, *, std: float = 0.02):
        super().__init__()
        self.std = std
        self.table = tag(nn.Parameter(torch.empty(math.prod(grid), dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state")
        return x + (self.table if ctx.positions is None else self.table[ctx.positions])


class GridSinusoids(nn.Module):
    """Adds fixed sines and cosines of each patch's column, in the first half of the features, and row, in the second.

    Stream (B, T, D) -> (B, T, D), D a multiple of 4. Each half is sines, then cosines, of its number over
    10000^(i / (D / 4)). With ctx.positions (B, T), those patches alone.
    """

    def __init__(self, dim: int, grid: Grid):
        super().__init__()
        if dim % 4:
            raise UserError(f"sinusoids of rows and columns take a width that is a multiple of 4, not {dim}")
        turn = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        row, column = (torch.arange(n)[:, None] * turn for n in grid)
        wave = lambda angle: torch.cat([angle.sin(), angle.cos()], -1)
        rows, columns = wave(row)[:, None].expand(-1, grid[1], -1), wave(column).expand(grid[0], -1, -1)
        self.register_buffer("table", torch.cat([columns, rows], -1).flatten(0, 1), persistent=False)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state")
        return x + (self.table if ctx.positions is None else self.table[ctx.positions]).to(x.dtype)


class First(nn.Module):
    """What the class token has become. Stream (B, T, D) -> (B, D)."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Stream) -> Pooled:
        return x[:, 0]


class Mean(nn.Module):
    """The mean over the stream. (B, T, D) -> (B, D)."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Stream) -> Pooled:
        return x.mean(1)


class ImageClassifier(nn.Module):
    """trunk -> pool -> classifier. Images (B, C, Y, X) -> logits (B, V). channels, size, classes: the task's."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self,
        channels: int,
        size: int | Grid,
        classes: int,
        *,
        trunk: Part,
        pool: Part = part(Mean),
        classifier: Part = part(Linear),
    ):
        super().__init__()
        self.trunk = trunk(channels, size)
        self.pool = pool(self.trunk.width)
        self.classifier = classifier(self.trunk.width, classes)

    def features(self, images: Images) -> Pooled:
        return self.pool(self.trunk(images))

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.classifier(self.features(images))
