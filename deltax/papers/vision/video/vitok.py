"""Learnings from Scaling Visual Tokenizers for Reconstruction and Generation.
Hansen-Estruch, Yan, Chung, Zohar, Wang, Hou, Xu, Vishwanath, Vajda, Chen, 2025. arXiv:2501.09755

A ViT, but encoder and decoder of an autoencoder, joined by a narrow Gaussian latent at every cube of a video.

Where tokenizers convolve, level by level, this one cuts the video into cubes, maps each linearly, and leaves the rest
to a transformer as Llama's: RMS norm, SwiGLU, and rotary positions in time, rows and columns, which alone say where a
cube stands, so one model reads any size. Attention looks everywhere. What can be kept is E, the number of floats in the
latent: cubes times channels. The paper finds that E decides how well pixels come back, however it is split between
many cubes and many channels, that a larger encoder hardly helps, and a larger decoder does. It learns with a
perceptual loss too, and later an adversary, which are no part of this. A picture is a video of one frame.
"""

import math

import torch
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.papers.language.feedforward.swiglu import SwiGLU, silu
from deltax.papers.language.norm.rms_norm import RMSNorm
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.video.rope_3d import Rotary3D
from deltax.parts.attention.context import Context
from deltax.parts.model.autoencoder import Autoencoder, Gaussian, rebuild
from deltax.parts.model.linear import Linear
from deltax.parts.model.stack import Stack
from deltax.parts.model.videos import Cube, Video, as_maps, as_stream, cubed, uncubed
from deltax.parts.training.run import Loop
from deltax.shapes import Positions
from deltax.tasks.images.videos import MovingDigits

ROOM = 1024  # rows and columns that positions leave room for


def standing(space: Cube, device: torch.device | str = "cpu") -> Positions:
    """Where each cube of T x Y x X stands in a video of ROOM rows and columns, (T Y X,)."""
    t, y, x = (torch.arange(size, device=device) for size in space)
    return ((t[:, None, None] * ROOM + y[:, None]) * ROOM + x).flatten()


class CubeEncoder(nn.Module):
    """cubes -> linear -> stack -> norm -> linear. (B, C, T, Y, X) -> (B, out, T / t, Y / y, X / x), cubes t x y x x."""

    gives_context = ("grid",)

    def __init__(self, channels: int, out: int, *, dim: int, cube: Cube, stack: Part, norm: Part):
        super().__init__()
        self.cube = cube
        self.embed = Linear(channels * math.prod(cube), dim)
        self.stack = stack(dim)
        self.norm, self.leave = norm(dim), Linear(dim, out)

    def forward(self, video: Video) -> Video:
        cubes = cubed(video, self.cube)
        return as_maps(self.leave(_through(self, self.embed(as_stream(cubes)), cubes)), tuple(cubes.shape[2:]))


class CubeDecoder(nn.Module):
    """linear -> stack -> norm -> linear -> pixels of the cubes. (B, latent, T, Y, X) -> (B, C, T t, Y y, X x)."""

    gives_context = ("grid",)

    def __init__(self, latent: int, channels: int, *, dim: int, cube: Cube, stack: Part, norm: Part):
        super().__init__()
        self.cube = cube
        self.enter = Linear(latent, dim, std=latent**-0.5)
        self.stack = stack(dim)
        self.norm, self.leave = norm(dim), Linear(dim, channels * math.prod(cube))

    def forward(self, latent: Video) -> Video:
        said = self.leave(_through(self, self.enter(as_stream(latent)), latent))
        return uncubed(as_maps(said, tuple(latent.shape[2:])), self.cube)


def _through(coder: CubeEncoder | CubeDecoder, stream: Tensor, cubes: Video) -> Tensor:
    """A coder's stack and norm, told where each cube stands."""
    space = tuple(cubes.shape[2:])
    return coder.norm(coder.stack(stream, Context(positions=standing(space, stream.device), grid=space[1:])))


def floats(video: Cube, cube: Cube, width: int) -> int:
    """E, the floats in the latent of a video of T x Y x X."""
    return math.prod(size // of for size, of in zip(video, cube, strict=True)) * width


@paper(on=vit, year=2025, arxiv="2501.09755")
def vitok(
    recipe: Part, *, cube: Cube = (4, 4, 4), width: int = 8, encoder: int = 2, decoder: int = 4, weight: float = 1e-3
) -> Part:
    stack = recipe["model.trunk.stack"].fill("norm", RMSNorm).fill("mlp", SwiGLU, activation=silu)
    stack = stack.fill("qk_position", Rotary3D, rows=ROOM, columns=ROOM)
    shared = {"dim": recipe["model.trunk.dim"], "cube": cube, "norm": part(RMSNorm)}
    model = part(
        Autoencoder,
        encoder=part(CubeEncoder, stack=stack.set(Stack, depth=encoder), **shared),
        bottleneck=part(Gaussian, width=width, weight=weight),
        decoder=part(CubeDecoder, stack=stack.set(Stack, depth=decoder), **shared),
    )
    recipe = recipe.put("model", model).put("task", part(MovingDigits, frames=8))
    return recipe.put("objective", part(rebuild, of="videos")).put("loop", part(Loop, batch=32, steps=400))
