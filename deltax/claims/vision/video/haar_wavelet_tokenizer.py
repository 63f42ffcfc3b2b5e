"""Claims of haar-wavelet-tokenizer: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from deltax import claim
from deltax.papers.vision.video.haar_wavelet_tokenizer import (
    analysed,
    haar_wavelet_tokenizer,
    reconstructed,
    synthesised,
)
from deltax.parts.model.videos import cubed


@claim
def nothing_is_lost_and_no_energy_is_made():
    """As a matrix M the transform has M M' = I, over images and over videos, at any depth: it is undone by its
    transpose, and the sum of squares stays."""
    for shape, levels in (((3, 4, 8), 2), ((1, 8, 8), 3), ((2, 4, 2, 6), 1), ((1, 4, 4, 4), 2)):
        size = math.prod(shape)
        basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
        matrix = analysed(basis, levels=levels).flatten(1)
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
        x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
        there = analysed(x, levels=levels, rescale=1.7)
        torch.testing.assert_close(synthesised(there, levels=levels, rescale=1.7), x)
        weight = torch.randn_like(there)
        (slope,) = torch.autograd.grad((there * weight).sum(), x)
        torch.testing.assert_close(slope, synthesised(weight, levels=levels) / 1.7**levels)


@claim
def a_constant_keeps_its_value():
    """Rescaled as Cosmos does, a constant video is that constant in the first band and zero in all others."""
    for levels in (1, 2):
        video = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64).view(1, 3, 1, 1, 1)
        bands = haar_wavelet_tokenizer(video.expand(2, 3, 1 + 2**levels, 4, 8), levels=levels)
        torch.testing.assert_close(bands[:, :3], video.expand(2, 3, 2, 4 // 2**levels, 8 // 2**levels))
        torch.testing.assert_close(bands[:, 3:], torch.zeros_like(bands[:, 3:]))


@claim
def a_picture_is_a_video_of_one_frame():
    """The first group of a video is what its first frame alone gives, later frames do not reach earlier groups, and
    the video comes back, its gradients too."""
    torch.manual_seed(0)
    for levels in (1, 2):
        p = 2**levels
        video = torch.randn(2, 3, 1 + 2 * p, 4, 8, dtype=torch.float64, requires_grad=True)
        bands = haar_wavelet_tokenizer(video, levels=levels)
        assert bands.shape == (2, 3 * 8**levels, 3, 4 // p, 8 // p)
        torch.testing.assert_close(haar_wavelet_tokenizer(video[:, :, :1], levels=levels), bands[:, :, :1])
        torch.testing.assert_close(haar_wavelet_tokenizer(video[:, :, : 1 + p], levels=levels), bands[:, :, :2])
        back, weight = reconstructed(bands, levels=levels), torch.randn_like(video)
        torch.testing.assert_close(back, video)
        torch.testing.assert_close(torch.autograd.grad((back * weight).sum(), video)[0], weight)


@claim
def it_is_space_to_depth_turned():
    """The bands of a video are an orthogonal map of what space to depth gives, the same at every place."""
    torch.manual_seed(0)
    for levels in (1, 2):
        p = 2**levels
        cubes = torch.eye(p**3, dtype=torch.float64).view(p**3, 1, p, p, p)
        turn = analysed(cubes, levels=levels).flatten(1)  # (p^3, p^3)
        video = torch.randn(2, 3, 2 * p, p, 3 * p, dtype=torch.float64)
        depth = cubed(video, (p, p, p)).unflatten(1, (3, p**3))
        turned = torch.einsum("bcptyx,pq->bqctyx", depth, turn).flatten(1, 2)
        torch.testing.assert_close(analysed(video, levels=levels), turned)


@claim.parity(peer="PyWavelets dwtn, and WaveletPacket2D for the second level")
def equals_pywavelets():
    """Each band of an image and of a video is PyWavelets' of that name, and each of the second level its packet's."""
    import numpy as np
    import pywt

    torch.manual_seed(0)
    for shape in ((4, 6), (6, 2, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        bands, theirs = analysed(x[None, None], levels=1)[0], pywt.dwtn(x.numpy(), "haar")
        for band, name in zip(bands, sorted(theirs), strict=True):
            np.testing.assert_allclose(band.numpy(), theirs[name], atol=1e-12)
    x = torch.randn(8, 12, dtype=torch.float64)
    packet = pywt.WaveletPacket2D(x.numpy(), "haar", maxlevel=2)
    names = ("a", "v", "h", "d")  # low-low, low rows and high columns, high rows and low columns, high-high
    paths = [first + second for second in names for first in names]
    for band, path in zip(analysed(x[None, None], levels=2)[0], paths, strict=True):
        np.testing.assert_allclose(band.numpy(), packet[path].data, atol=1e-12)


@claim.parity(peer="diffusers CosmosPatchEmbed3d and CosmosUnpatcher3d")
def equals_diffusers():
    """The bands of a video, in order and scale, are those that diffusers' Cosmos patches it into, and what comes back
    of any bands is what it puts together, with gradients, at one level and two."""
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosPatchEmbed3d, CosmosUnpatcher3d

    torch.manual_seed(0)
    for levels in (1, 2):
        p = 2**levels
        video = torch.randn(2, 3, 1 + 2 * p, 3 * p, p, dtype=torch.float64, requires_grad=True)
        ours, theirs = haar_wavelet_tokenizer(video, levels=levels), CosmosPatchEmbed3d(p).double()(video)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # its filters are float32
        weight = torch.randn_like(ours)
        back, peer = reconstructed(weight, levels=levels), CosmosUnpatcher3d(p).double()(weight)
        torch.testing.assert_close(back, peer, rtol=1e-6, atol=1e-6)
        slopes = [torch.autograd.grad((y * weight).sum(), video)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


@claim.measured(paper="the wavelet removes redundancy of pixels before anything is learned (section 4.1)")
def smooth_and_rough_stand_apart(lab):
    """Of the energy of random images whose spectrum falls as 1/f, as that of photographs does, the smooth band of two
    levels holds at least 30 points more than the fullest of the 16 channels that a pixel-unshuffle makes."""
    gains = []
    for seed in lab.seeds(5):
        images = _pink(seed)
        bands = analysed(images, levels=2).square().sum((0, 2, 3))
        pixels = torch.nn.functional.pixel_unshuffle(images, 4).square().sum((0, 2, 3))
        gains.append(100 * (bands[0] / bands.sum() - pixels.max() / pixels.sum()).item())
    return lab.at_least(gains, 30.0, unit="points of energy")


def _pink(seed: int, *, count: int = 16, size: int = 32) -> Float[Tensor, "B 1 Y X"]:
    """Gaussian images with amplitudes that fall as 1/f, without a mean."""
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (f[:, None].square() + f.square()).sqrt()
    fall = torch.where(radius > 0, 1 / radius.clamp(min=1e-9), 0.0)
    return torch.fft.ifft2(torch.fft.fft2(noise) * fall).real
