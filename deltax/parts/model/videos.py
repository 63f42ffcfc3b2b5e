"""Videos cut into cubes, and cubes put together again. A video is (B, C, T, Y, X), a picture a video of one frame."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deltax.errors import UserError

Video = Float[Tensor, "B _ _ _ _"]
Cube = tuple[int, int, int]  # frames, rows, columns


def cubed(video: Video, cube: Cube) -> Video:
    """Each cube of pixels as one vector in the order channel, frame, row, column: (B, C t y x, T / t, Y / y, X / x).

    Raises UserError for a video that is not made of such cubes.
    """
    if any(size % of for size, of in zip(video.shape[2:], cube, strict=True)):
        shape, by = (" x ".join(map(str, sizes)) for sizes in (video.shape[2:], cube))
        raise UserError(f"a video of {shape} is not made of cubes of {by}: cut or pad it to a multiple of each")
    t, y, x = cube
    cut = video.unflatten(4, (-1, x)).unflatten(3, (-1, y)).unflatten(2, (-1, t))
    return cut.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def uncubed(cubes: Video, cube: Cube) -> Video:
    """The video that `cubed` cut."""
    parts = cubes.unflatten(1, (-1, *cube))
    return parts.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def preceded(video: Video, frames: int) -> Video:
    """A video with its first frame put before it `frames` times."""
    return torch.cat([video[:, :, :1].expand(-1, -1, frames, -1, -1), video], 2)


def grouped(video: Video, patch: int) -> Video:
    """A video of 1 + k patch frames whose first stands `patch` times at the front: 1 + k whole groups."""
    if (video.shape[2] - 1) % patch:
        raise UserError(f"{video.shape[2]} frames are not 1 + a multiple of {patch}: cut or pad the video")
    return preceded(video, patch - 1)


class Cubes:
    """Space to depth: cubes of 2^levels frames, rows and columns in the channels, the first frame in one alone.

    (B, C, 1 + k p, Y, X) -> (B, p^3 C, 1 + k, Y / p, X / p).
    """

    def __init__(self, *, levels: int = 2):
        self.patch = 2**levels

    def cut(self, video: Video) -> Video:
        return cubed(grouped(video, self.patch), (self.patch,) * 3)

    def join(self, cubes: Video) -> Video:
        return uncubed(cubes, (self.patch,) * 3)[:, :, self.patch - 1 :]


def as_stream(maps: Video) -> Float[Tensor, "B _ _"]:
    """(B, D, T, Y, X) -> (B, T Y X, D), frame by frame and row by row."""
    return maps.flatten(2).mT


def as_maps(stream: Float[Tensor, "B _ _"], space: Cube) -> Video:
    """What `as_stream` laid out, of T, Y, X."""
    return stream.mT.unflatten(2, space)


@torch.no_grad()
def film(videos: Video, model: Callable[[Video], Any]) -> Any:
    """A matplotlib figure: the frames of each video, and under them the `.pixels` that a model makes of it."""
    from matplotlib.figure import Figure

    made = model(videos).pixels
    rows = [row for pair in zip(videos[:, 0], made[:, 0], strict=True) for row in pair]
    figure = Figure(figsize=(0.6 * videos.shape[2], 0.6 * len(rows)))
    for axes, row in zip(figure.subplots(len(rows), videos.shape[2], squeeze=False), rows, strict=True):
        for ax, frame in zip(axes, row, strict=True):
            ax.imshow(frame.numpy(), cmap="gray_r", vmin=-1, vmax=1)
            ax.set_axis_off()
    return figure
