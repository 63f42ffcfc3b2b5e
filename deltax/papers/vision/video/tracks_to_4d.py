"""Fast Encoder-Based 3D from Casual Videos via Point Track Processing. Kasten, Lu, Maron, 2024. arXiv:2404.07097

A transformer, but its input is 2-D point tracks of a video, and its output cameras and 3-D points.

Without depth, a video determines a scene only if its points move in few ways. So a scene is a few basis shapes, X_i(p)
= B_1(p) + sum_k c_ik B_k(p), seen by one camera per frame: non-rigid structure from motion, in one forward pass instead
of an optimisation per video. Attention alternates along time and across points; points have no order. Training uses the
tracks only: the projection must match them, B_1 alone must explain static points, and each point predicts how far it
moves. The paper has about 12 bases and trains on videos of pets; the loss weights are chosen here for synthetic videos.
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
Camera = tuple[Float[Tensor, "B N P 2"], Float[Tensor, "B N P"]]  # image positions, and depths


class Scene(NamedTuple):
    """A video's scene.

    rotation      (B, N, 3, 3), R_i, columns are the camera's axes
    place         (B, N, 3), t_i, the camera's position
    coefficients  (B, N, K - 1), c_ik, of each basis but the first
    bases         (B, K, P, 3), B_k
    movement      (B, P), gamma_p > 0: how far a point moves from B_1
    """

    rotation: Float[Tensor, "B N 3 3"]
    place: Float[Tensor, "B N 3"]
    coefficients: Float[Tensor, "B N _"]
    bases: Float[Tensor, "B K P 3"]
    movement: Float[Tensor, "B P"]

    @in_float32
    def points(self) -> Points:
        """X_i(p) = B_1(p) + sum_k c_ik B_k(p), (B, N, P, 3)."""
        return self.bases[:, :1] + torch.einsum("bnk,bkpx->bnpx", self.coefficients, self.bases[:, 1:])

    @in_float32
    def film(self, points: Points) -> Camera:
        """The projection pi(R_i' (X - t_i)) of points, and their depths; depths are clamped to 0.1 in the division."""
        x = torch.einsum("bnyx,bnpy->bnpx", self.rotation, points - self.place[:, :, None])
        return x[..., :2] / x[..., 2:].clamp(min=0.1), x[..., 2]

    def seen(self) -> Camera:
        """The scene's projection by its cameras."""
        return self.film(self.points())


@needs(context=("grid",))
class Axial(nn.Module):
    """Two inner blocks: one along time at each point, one across the points of each frame.

    Stream (B, N P, D) with ctx.grid (N, P) -> (B, N P, D).
    """

    def __init__(self, dim: int, *, inner: Part):
        super().__init__()
        self.time, self.across = inner(dim), inner(dim)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "positions", "segments", "place")
        frames, points = ctx.grid
        columns = x.unflatten(1, ctx.grid).transpose(1, 2).flatten(0, 1)  # (B P, N, D)
        columns = self.time(columns, Context()).unflatten(0, (-1, points))
        # (B N, P, D), without positions: equivariant to their order
        rows = self.across(columns.transpose(1, 2).flatten(0, 1), Context())
        return rows.unflatten(0, (-1, frames)).flatten(1, 2)


class TracksTo4D(nn.Module):
    """Tracks (B, N, P, 3) of x, y and visibility -> `Scene` with K `bases`. The task gives `frames`."""

    interface = TRACKS_TO_SCENE
    gives_context = ("grid",)

    def __init__(self, frames: int, *, dim: int, bases: int, position: Part, stack: Part, norm: Part):
        super().__init__()
        self.embed = Linear(3, dim)
        self.position = position(dim, frames)
        self.stack = stack(dim)
        self.norm = norm(dim)
        # 6 + 3 + K - 1 and 3 K + 1 outputs
        self.camera, self.shape = Linear(dim, 8 + bases), Linear(dim, 3 * bases + 1)

    def forward(self, tracks: Points) -> Scene:
        frames, points = tracks.shape[1:3]
        x = self.embed(tracks).transpose(1, 2).flatten(0, 1)
        x = self.position(x, Context()).unflatten(0, (-1, points)).transpose(1, 2).flatten(1, 2)
        x = self.norm(self.stack(x, Context(grid=(frames, points)))).unflatten(1, (frames, points))
        # cameras pool over points, bases over frames
        return scene_of(self.camera(x.mean(2)), self.shape(x.mean(1)))


@needs("tracks", model=TRACKS_TO_SCENE)
def film_alone(model: nn.Module, batch: Films) -> PerExample:
    """`explain` of the model's scene for the tracks; no other supervision."""
    return explain(model(batch.tracks), batch.tracks)


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
        optimizer=part(adamw, rate=2e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=600),
    )


def rotations(six: Float[Tensor, "*B 6"]) -> Float[Tensor, "*B 3 3"]:
    """Rotation matrices from six numbers by Gram-Schmidt, columns orthonormal; zeros give the identity.

    The 6-D representation is continuous (arXiv:1812.07035).
    """
    six = six + six.new_tensor([1.0, 0, 0, 0, 1, 0])  # zeros become the identity
    first = nn.functional.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first  # Gram-Schmidt
    second = nn.functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


@in_float32
def scene_of(cameras: Float[Tensor, "B N _"], shapes: Float[Tensor, "B P _"], *, away: float = 4.0) -> Scene:
    """A `Scene` from 6 + 3 + K - 1 numbers per frame and 3 K + 1 per point; zeros give a camera `away` from the
    origin."""
    rotation = rotations(cameras[..., :6])
    middle = cameras[..., 6:9] + cameras.new_tensor([0.0, 0.0, away])
    place = -torch.einsum("bnxy,bny->bnx", rotation, middle)
    bases = shapes[..., :-1].unflatten(-1, (-1, 3)).transpose(1, 2)
    # gamma_p starts near softplus(-3) = 0.05
    return Scene(rotation, place, cameras[..., 9:], bases, nn.functional.softplus(shapes[..., -1] - 3) + 1e-3)


def reprojection(image: Float[Tensor, "B N P 2"], tracks: Points) -> PerExample:
    """The mean distance to the tracks, over visible points."""
    seen = tracks[..., 2]
    # averaged over visible points only
    return (_off(image, tracks) * seen).sum((1, 2)) / seen.sum((1, 2))


def cauchy(off: Tensor, spread: Tensor) -> Tensor:
    """log(spread + off^2 / spread): the negative log-likelihood of a Cauchy distribution, minus log pi."""
    return torch.log(spread + off**2 / spread)


def standing(scene: Scene, tracks: Points) -> PerExample:
    """The static loss: `cauchy` of the projection of B_1 alone, with each point's movement as its spread."""
    image, _ = scene.film(scene.bases[:, :1].expand(-1, tracks.shape[1], -1, -1))  # B_1 in every frame
    seen = tracks[..., 2]
    surprise = cauchy(_off(image, tracks), scene.movement[:, None])
    return (surprise * seen).sum((1, 2)) / seen.sum((1, 2))


def explain(
    scene: Scene, tracks: Points, *, still: float = 0.02, behind: float = 1.0, sparse: float = 0.005
) -> PerExample:
    """`reprojection` + `still` * `standing` + `behind` * mean depth behind the cameras + `sparse` * mean distance
    from B_1."""
    points = scene.points()
    image, depth = scene.film(points)
    strayed = (points - scene.bases[:, :1]).square().sum(-1).add(1e-8).sqrt()
    loss = reprojection(image, tracks) + still * standing(scene, tracks)
    # depths below 0.1 are behind or too near
    return loss + behind * torch.relu(0.1 - depth).mean((1, 2)) + sparse * strayed.mean((1, 2))


def _off(image: Float[Tensor, "B N P 2"], tracks: Points) -> Float[Tensor, "B N P"]:
    return (image - tracks[..., :2]).square().sum(-1).add(1e-12).sqrt()
