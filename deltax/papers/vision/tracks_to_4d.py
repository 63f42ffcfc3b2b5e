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

from deltax import Part, claim, paper, part
from deltax.contract import TRACKS_TO_SCENE, needs
from deltax.paper import paper_of
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.language.transformer import Sinusoidal, transformer
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.parts.checking import randomise
from deltax.parts.context import Context
from deltax.parts.linear import Linear
from deltax.parts.mlp import gelu
from deltax.parts.nothing import Nothing
from deltax.parts.optimizers import adamw
from deltax.parts.precision import in_float32
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.stack import PreNorm, Stack
from deltax.shapes import PerExample, Stream
from deltax.tasks.tracks import Films, Tracks, depth_error, image_error

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
        optimizer=part(adamw, rate=2e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=600),
    )


def optimised(tracks: Points, *, bases: int = 4, steps: int = 1000, rate: float = 0.02) -> Scene:
    """What the network is to save: each film's scene found by itself, `steps` of Adam on `explain` from a small random
    cloud before cameras that stand still."""
    count, frames, points, _ = tracks.shape
    torch.manual_seed(0)
    cameras = tracks.new_zeros(count, frames, 8 + bases).requires_grad_()
    shapes = (0.1 * torch.randn(count, points, 3 * bases + 1)).to(tracks).requires_grad_()
    adam = torch.optim.Adam([cameras, shapes], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        explain(scene_of(cameras, shapes), tracks).sum().backward()
        adam.step()
    return Scene(*(x.detach() for x in scene_of(cameras, shapes)))


@claim
def points_have_no_order():
    """Giving the points in another order gives their shapes and movements in that order, and the same cameras and
    coefficients; losses stay, and so does every parameter's gradient."""
    model, tracks = _tiny()
    order = torch.randperm(tracks.shape[2])
    gradients = []
    for given in (tracks, tracks[:, :, order]):
        model.zero_grad()
        explain(model(given), given).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    plain, mixed = model(tracks), model(tracks[:, :, order])
    torch.testing.assert_close(tuple(mixed), (*plain[:3], plain.bases[:, :, order], plain.movement[:, order]))
    assert not torch.allclose(plain.bases, mixed.bases)


@claim
def time_runs_forward():
    """Without positions in time, shuffled images give shuffled cameras and coefficients and the same shapes; with them
    they do not."""
    for position, same in ((Nothing, True), (Sinusoidal, False)):
        model, tracks = _tiny(position)
        order = torch.tensor([3, 0, 4, 1, 2])
        plain, mixed = model(tracks), model(tracks[:, order])
        assert torch.allclose(mixed.bases, plain.bases) == same
        assert torch.allclose(mixed.coefficients, plain.coefficients[:, order]) == same
        assert torch.allclose(mixed.place, plain.place[:, order]) == same


@claim
def a_film_has_few_ways_to_move():
    """All points of all images, a matrix of 3 N by P, have a rank of 3 K and no more; where nothing is added to the
    first shape it is 3."""
    tracks = torch.randn(2, 9, 17, 3, dtype=torch.float64)
    for bases in (1, 2, 4):
        scene = _tiny(bases=bases)[0](tracks)
        still = scene._replace(coefficients=torch.zeros_like(scene.coefficients))
        for found, rank in ((scene, 3 * bases), (still, 3)):
            matrix = found.points().transpose(2, 3).flatten(1, 2)
            assert matrix.shape == (2, 27, 17) and (torch.linalg.matrix_rank(matrix, rtol=1e-9) == rank).all()


@claim
def a_film_has_no_north_and_no_scale():
    """Turning, moving and scaling the world, cameras and all, changes no image and no loss but that of sparsity, which
    scales; depths scale with it. Cameras are turned, never mirrored."""
    model, tracks = _tiny()
    scene = model(tracks)
    turn, shift = rotations(torch.randn(6, dtype=torch.float64)), torch.randn(3, dtype=torch.float64)
    bases = 2.5 * scene.bases @ turn.T
    bases = torch.cat([bases[:, :1] + shift, bases[:, 1:]], 1)
    moved = Scene(turn @ scene.rotation, 2.5 * scene.place @ turn.T + shift, scene.coefficients, bases, scene.movement)
    near = scene.seen()[1] > 0.3
    torch.testing.assert_close(moved.seen()[0][near], scene.seen()[0][near])
    torch.testing.assert_close(moved.seen()[1], 2.5 * scene.seen()[1])
    assert near.double().mean() > 0.3
    for rotation in (scene.rotation, moved.rotation):
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation))
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(rotation.shape[:2], dtype=torch.float64))


@claim
def what_moves_opts_out():
    """A distance costs least under a spread as large as itself, where it costs its logarithm and log 2; its pull, never
    above 1 / spread, fades as it grows, so what moves hardly pulls on the first shape."""
    off = torch.tensor([0.03, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cauchy(off, off.detach()), off.detach().log() + torch.tensor(2.0).double().log())
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert (cauchy(off, factor * off) > cauchy(off, off)).all()
    (pull,) = torch.autograd.grad(cauchy(off, torch.full_like(off, 0.02)).sum(), off)
    assert (pull[1:] < pull[:-1]).all() and (pull <= 50).all()


@claim.measured(paper="accuracy near the state of the art with up to 95 % less time (abstract)")
def one_pass_saves_the_time(lab):
    """One pass over a film takes at least 20 times less time than 1000 steps of optimising that film alone."""
    recipe = lab.recipe("tracks-to-4d")
    tracks = lab.task(recipe).all().tracks[:1]
    model = recipe().build(lab.task(recipe).facts).eval()
    once = torch.no_grad()(lambda: model(tracks))
    ratio = lab.ratio(once, lambda: optimised(tracks, steps=100), repeats=5)
    low, high = 10 * ratio.low, 10 * ratio.high
    outcome = "supported at this scale" if low > 20 else "opposite at this scale" if high < 1 else "inconclusive"
    outcome = "not seen at this scale" if 1 <= high < 20 else outcome
    numbers = {"times as fast, 1000 steps counted as ten times the 100 that were timed": 10 * ratio.value}
    return lab.verdict(outcome, estimate=10 * ratio.value, interval=(low, high), unit="times", numbers=numbers)


@claim.measured(paper="accuracy near the state of the art with up to 95 % less time (abstract)")
def it_is_as_good_as_optimising(lab):
    """On held-out films its depths are at most 2 points further off than those of 1000 steps of optimising each."""
    runs = [lab.train("tracks-to-4d", seed=seed) for seed in lab.seeds(3)]
    films = runs[0].task.all()
    scene = optimised(films.tracks)
    image, depth = scene.seen()
    alone = depth_error(depth, films).mean().item()
    numbers = {
        "% of depth, optimised": alone,
        "% of depth, all points as deep": depth_error(torch.ones_like(depth), films).mean().item(),
        "% of depth, one pass": [run.score for run in runs],
        "% off on the image, optimised": image_error(image, films).mean().item(),
        "% off on the image, one pass": [run.evaluation.metrics["% off on the image"] for run in runs],
    }
    return lab.at_most([run.score - alone for run in runs], 2.0, unit="points of depth", numbers=numbers)


def _tiny(position: type[nn.Module] = Sinusoidal, bases: int = 3) -> tuple[TracksTo4D, Points]:
    """A small model in float64 with random weights, tracks of 5 images and 7 points."""
    recipe = paper_of(tracks_to_4d)(dim=12, depth=1, heads=3, bases=bases).fill("position", position)
    model = randomise(recipe().build({"frames": 5}), std=0.3)
    tracks = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    return model, torch.cat([tracks[..., :2], (tracks[..., 2:] > -1).double()], -1)
