"""Cosmos World Foundation Model Platform for Physical AI, section 4.1: the wavelets of its tokenizer. NVIDIA, 2025.
arXiv:2501.03575

Space to depth, but in Haar's basis, so that what is smooth stands apart from what is not before anything is learned.

A pair of neighbours becomes its sum and its difference over sqrt 2. Along rows and columns, and for a video along time,
that makes four or eight bands of half the size; the next level does the same to every band, not to the smooth one alone
(a wavelet packet). Nothing is lost and no energy is made. Cosmos divides each level by sqrt 2 an axis, so that a
constant keeps its value. A video's first frame is put before it until it fills a group alone, so that a picture is a
video of one frame and no group looks ahead.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.parts.model.videos import Video, grouped

Field = Float[Tensor, "B _ ..."]  # images (B, C, Y, X) or videos (B, C, T, Y, X)


def analysed(x: Field, *, levels: int = 2, rescale: float = 1.0) -> Field:
    """Bands in the channels: (B, C, N...) -> (B, 2^(n levels) C, N / 2^levels...), over all n axes after the channels.

    Channels count by the last level's band, slowest, then those of the levels before, then x's channel; bands go from
    low to high, the first axis slowest. Every level is divided by `rescale`. Raises UserError where an axis does not
    halve that often.
    """
    axes = range(2, x.ndim)
    for axis in axes:
        if x.shape[axis] % 2**levels:
            raise UserError(f"an axis of {x.shape[axis]} does not halve {levels} times: cut or pad it to a multiple")
    for _ in range(levels):
        bands = [x]
        for axis in axes:
            bands = [half for band in bands for half in _halves(band, axis)]
        x = torch.cat(bands, 1) / rescale
    return x


def synthesised(bands: Field, *, levels: int = 2, rescale: float = 1.0) -> Field:
    """What `analysed` took apart, (B, 2^(n levels) C, ...) -> (B, C, ...)."""
    axes = range(2, bands.ndim)
    for _ in range(levels):
        parts = list((bands * rescale).chunk(2 ** len(axes), 1))
        for axis in reversed(axes):
            parts = [_joined(low, high, axis) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        (bands,) = parts
    return bands


def _halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return (even + odd) / math.sqrt(2), (even - odd) / math.sqrt(2)


def _joined(low: Tensor, high: Tensor, axis: int) -> Tensor:
    pair = torch.stack([low + high, low - high], axis + 1) / math.sqrt(2)
    return pair.flatten(axis, axis + 1)


@paper(year=2025, arxiv="2501.03575")
def haar_wavelet_tokenizer(video: Video, *, levels: int = 2) -> Video:
    """A video of 1 + k 2^levels frames as 1 + k groups of bands, (B, 8^levels C, 1 + k, Y / p, X / p).

    The first frame stands p = 2^levels times at the front, and each level is divided by 2 sqrt 2, so a constant keeps
    its value. `reconstructed` is its inverse.
    """
    return analysed(grouped(video, 2**levels), levels=levels, rescale=2 * math.sqrt(2))


def reconstructed(bands: Video, *, levels: int = 2) -> Video:
    """The video of `haar_wavelet_tokenizer`; the frames put in front are dropped."""
    return synthesised(bands, levels=levels, rescale=2 * math.sqrt(2))[:, :, 2**levels - 1 :]


class Haar:
    """The wavelets as what a tokenizer begins and ends with, where `Cubes` would stand."""

    def __init__(self, *, levels: int = 2):
        self.patch, self.levels = 2**levels, levels

    def cut(self, video: Video) -> Video:
        return haar_wavelet_tokenizer(video, levels=self.levels)

    def join(self, bands: Video) -> Video:
        return reconstructed(bands, levels=self.levels)
