"""Fast Encoder-Based 3D from Casual Videos via Point Track Processing. Kasten, Lu, Maron, 2024. arXiv:2404.07097

A transformer, but what it reads is where points of a film are in each image, and it says where they and the camera
were in space.

Film without depth says nothing of space unless points move in few ways. So each film is a few shapes, B_1 as it stands
and others added to it as much as each image says, X_i(p) = B_1(p) + sum c_ik B_k(p), seen by one camera an image:
non-rigid structure from motion, but one pass in place of an optimisation a film. Attention goes along time and across
points by turns, and points have no order. Nothing is told but the tracks themselves: the film is to look as it did, B_1
alone explains what stands still, and each point says how far it is to be believed in that. The paper has about 12
shapes and learns from films of pets; how its losses weigh is chosen anew here, for films that are made.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import TRACKS_TO_SCENE, needs
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.language.models.transformer import Sinusoidal, transformer
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import Linear
from deltax.parts.model.mlp import gelu
from deltax.parts.model.stack import PreNorm, Stack
from deltax.parts.numerics.precision import in_float32
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import PerExample, Stream
from deltax.tasks.images.tracks import Films, Tracks

Points = Float[Tensor, "B N P 3"]
Camera = tuple[Float[Tensor, "B N P 2"], Float[Tensor, "B N P"]]  # places on the image, and depths


def rotations(six: Float[Tensor, "*B 6"]) -> Float[Tensor, "*B 3 3"]:
    """Two vectors made orthonormal in turn, and their cross product, as columns; of zeros, the identity.

    Six numbers for a rotation have no seams (arXiv:1812.07035).
    """
    six = six + six.new_tensor([1.0, 0, 0, 0, 1, 0])
    first = nn.functional.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = nn.functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


class Scene(NamedTuple):
    """A film in space.

    rotation      (B, N, 3, 3), columns are the camera's axes
    place         (B, N, 3), where the camera stands
    coefficients  (B, N, K - 1), how much of each shape but the first is in an image
    bases         (B, K, P, 3), the shapes
    movement      (B, P), above 0: how far a point strays from the first shape
    """

    rotation: Float[Tensor, "B N 3 3"]
    place: Float[Tensor, "B N 3"]
    coefficients: Float[Tensor, "B N _"]
    bases: Float[Tensor, "B K P 3"]
    movement: Float[Tensor, "B P"]

    @in_float32
    def points(self) -> Points:
        """X_i(p)."""
        return self.bases[:, :1] + torch.einsum("bnk,bkpx->bnpx", self.coefficients, self.bases[:, 1:])

    @in_float32
    def film(self, points: Points) -> Camera:
        """Points as the cameras see them, pi(R'(X - t)), and their depths; nothing is seen nearer than 0.1."""
        x = torch.einsum("bnyx,bnpy->bnpx", self.rotation, points - self.place[:, :, None])
        return x[..., :2] / x[..., 2:].clamp(min=0.1), x[..., 2]

    def seen(self) -> Camera:
        """The scene as its cameras see it."""
        return self.film(self.points())


@in_float32
def scene_of(cameras: Float[Tensor, "B N _"], shapes: Float[Tensor, "B P _"], *, away: float = 4.0) -> Scene:
    """6 + 3 + K - 1 numbers an image and 3 K + 1 a point as a `Scene`; of zeros, a camera `away` from the middle."""
    rotation = rotations(cameras[..., :6])
    middle = cameras[..., 6:9] + cameras.new_tensor([0.0, 0.0, away])
    place = -torch.einsum("bnxy,bny->bnx", rotation, middle)
    bases = shapes[..., :-1].unflatten(-1, (-1, 3)).transpose(1, 2)
    return Scene(rotation, place, cameras[..., 9:], bases, nn.functional.softplus(shapes[..., -1] - 3) + 1e-3)


@needs(context=("grid",))
class Axial(nn.Module):
    """Two inner blocks: one along the time of each point, one across the points of each image.

    Stream (B, N P, D) with ctx.grid (N, P) -> (B, N P, D).
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.time, self.across = inner(dim), inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "positions", "segments", "place")
        frames, points = ctx.grid
        columns = x.unflatten(1, ctx.grid).transpose(1, 2).flatten(0, 1)
        columns = self.time(columns, Context()).unflatten(0, (-1, points))
        rows = self.across(columns.transpose(1, 2).flatten(0, 1), Context())
        return rows.unflatten(0, (-1, frames)).flatten(1, 2)


class TracksTo4D(nn.Module):
    """Tracks (B, N, P, 3) of x, y and whether seen -> `Scene` with K `bases`. `frames` is the task's."""

    interface = TRACKS_TO_SCENE
    gives_context = ("grid",)

    def __init__(self, frames: int, *, dim: int, bases: int, position: Part, stack: Part, norm: Part):
        super().__init__()
        self.embed = Linear(3, dim)
        self.position = position(dim, frames)
        self.stack = stack(dim)
        self.norm = norm(dim)
        self.camera, self.shape = Linear(dim, 8 + bases), Linear(dim, 3 * bases + 1)

    def forward(self, tracks: Points) -> Scene:
        frames, points = tracks.shape[1:3]
        x = self.embed(tracks).transpose(1, 2).flatten(0, 1)
        x = self.position(x, Context()).unflatten(0, (-1, points)).transpose(1, 2).flatten(1, 2)
        x = self.norm(self.stack(x, Context(grid=(frames, points)))).unflatten(1, (frames, points))
        return scene_of(self.camera(x.mean(2)), self.shape(x.mean(1)))


def reprojection(image: Float[Tensor, "B N P 2"], tracks: Points) -> PerExample:
    """Mean distance to where each point was seen."""
    seen = tracks[..., 2]
    return (_off(image, tracks) * seen).sum((1, 2)) / seen.sum((1, 2))


def cauchy(off: Tensor, spread: Tensor) -> Tensor:
    """log(spread + off^2 / spread): how surprising a distance is under a Cauchy distribution, less log pi."""
    return torch.log(spread + off**2 / spread)


def standing(scene: Scene, tracks: Points) -> PerExample:
    """`cauchy` of the film that the first shape alone would give, each point spread as it says that it moves."""
    image, _ = scene.film(scene.bases[:, :1].expand(-1, tracks.shape[1], -1, -1))
    seen = tracks[..., 2]
    surprise = cauchy(_off(image, tracks), scene.movement[:, None])
    return (surprise * seen).sum((1, 2)) / seen.sum((1, 2))


def explain(
    scene: Scene, tracks: Points, *, still: float = 0.02, behind: float = 1.0, sparse: float = 0.005
) -> PerExample:
    """`reprojection`, `still` times `standing`, `behind` times the mean depth behind a camera, `sparse` times the mean
    distance of points from where they stand in the first shape."""
    points = scene.points()
    image, depth = scene.film(points)
    strayed = (points - scene.bases[:, :1]).square().sum(-1).add(1e-8).sqrt()
    loss = reprojection(image, tracks) + still * standing(scene, tracks)
    return loss + behind * torch.relu(0.1 - depth).mean((1, 2)) + sparse * strayed.mean((1, 2))


@needs("tracks", model=TRACKS_TO_SCENE)
def film_alone(model: nn.Module, batch: Films) -> PerExample:
    """`explain` of what the model makes of the tracks; nothing else is told."""
    return explain(model(batch.tracks), batch.tracks)


def _off(image: Float[Tensor, "B N P 2"], tracks: Points) -> Float[Tensor, "B N P"]:
    return (image - tracks[..., :2]).square().sum(-1).add(1e-12).sqrt()


@paper(on=transformer, year=2024, arxiv="2404.07097")
def tracks_to_4d(*, dim: int = 48, depth: int = 2, heads: int = 3, bases: int = 4) -> Part:
    stack = transformer["model.encoder"].fill("residual", PreNorm, norm=LayerNorm).fill("activation", gelu)
    stack = stack.set(Stack, depth=depth).set(Attention, heads=heads).wrap("block", Axial)
    model = part(TracksTo4D, dim=dim, bases=bases, position=Sinusoidal, stack=stack, norm=LayerNorm)
    return part(
        Run,
        model=model,
        task=Tracks,
        objective=film_alone,
        batches=from_task,
        optimizer=part(adamw, lr=2e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=600),
    )
