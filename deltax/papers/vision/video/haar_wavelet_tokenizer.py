"""Cosmos World Foundation Model Platform for Physical AI, section 4.1: the wavelets of its tokenizer. NVIDIA, 2025.
arXiv:2501.03575

Space-to-depth, but in an orthonormal Haar basis, so low frequencies are separated before anything is learned.

Two neighbours become their sum and difference over sqrt 2. Along rows and columns, and for a video time, this gives
four or eight bands of half the size; the next level splits every band, not only the low one (a wavelet packet). The
transform is orthonormal. Cosmos divides each level by sqrt 2 per axis, so that a constant keeps its value. The first
frame is repeated in front so that it fills its own group: an image is a one-frame video and no group depends on later
ones.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.parts.model.videos import Video, grouped

Field = Float[Tensor, "B _ ..."]  # images (B, C, Y, X) or videos (B, C, T, Y, X)


@paper(year=2025, arxiv="2501.03575")
def haar_wavelet_tokenizer(video: Video, *, levels: int = 2) -> Video:
    """A video of 1 + k 2^levels frames -> 1 + k groups of bands, (B, 8^levels C, 1 + k, Y / p, X / p).

    The first frame is repeated to p = 2^levels frames. `reconstructed` is the inverse.
    """
    # 2 sqrt 2 = sqrt 2 for each of three axes
    return analysed(grouped(video, 2**levels), levels=levels, rescale=2 * math.sqrt(2))


def reconstructed(bands: Video, *, levels: int = 2) -> Video:
    """The inverse of `haar_wavelet_tokenizer`; the repeated frames are dropped."""
    return synthesised(bands, levels=levels, rescale=2 * math.sqrt(2))[:, :, 2**levels - 1 :]


def analysed(x: Field, *, levels: int = 2, rescale: float = 1.0) -> Field:
    """The bands, in channels: (B, C, N...) -> (B, 2^(n levels) C, N / 2^levels...), over all n axes after the channels.

    Channel order: the last level's band slowest, then earlier levels', then x's channel; bands go from low to high, the
    first axis slowest. Each level is divided by `rescale`. Raises UserError where an axis is no multiple of 2^levels.
    """
    axes = range(2, x.ndim)
    for axis in axes:
        if x.shape[axis] % 2**levels:
            raise UserError(
                f"an axis of {x.shape[axis]} does not halve {levels} times: crop or pad it to a multiple of {2**levels}"
            )
    for _ in range(levels):
        bands = [x]
        for axis in axes:
            # low and high half of every band: 2^n bands per level
            bands = [half for band in bands for half in _halves(band, axis)]
        # the next level splits all bands: a wavelet packet
        x = torch.cat(bands, 1) / rescale
    return x


def synthesised(bands: Field, *, levels: int = 2, rescale: float = 1.0) -> Field:
    """The inverse of `analysed`, (B, 2^(n levels) C, ...) -> (B, C, ...)."""
    axes = range(2, bands.ndim)
    for _ in range(levels):
        parts = list((bands * rescale).chunk(2 ** len(axes), 1))
        for axis in reversed(axes):
            parts = [_joined(low, high, axis) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        (bands,) = parts
    return bands


def _halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return (even + odd) / math.sqrt(2), (even - odd) / math.sqrt(2)  # (a + b) / sqrt 2, (a - b) / sqrt 2


def _joined(low: Tensor, high: Tensor, axis: int) -> Tensor:
    pair = torch.stack([low + high, low - high], axis + 1) / math.sqrt(2)
    return pair.flatten(axis, axis + 1)


class Haar:
    """The wavelets as a tokenizer's patcher, in place of `Cubes`."""

    def __init__(self, *, levels: int = 2):
        self.patch, self.levels = 2**levels, levels

    def cut(self, video: Video) -> Video:
        return haar_wavelet_tokenizer(video, levels=self.levels)

    def join(self, bands: Video) -> Video:
        return reconstructed(bands, levels=self.levels)
