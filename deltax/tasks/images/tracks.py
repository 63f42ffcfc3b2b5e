"""Point tracks of films that are made here: points that sway in a few ways, seen by a camera that goes round them.

A film is a cloud of points with a shape of its own and some ways to deform it, each going to and fro at a pace of its
own; a part of the points does not move at all. The camera stands off and turns about the upright axis. Every point is
seen from time to time only. What is given are the tracks: where each point is in each image, and whether it is seen.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.contract import TRACKS_TO_SCENE, needs
from deltax.errors import UserError, nearest
from deltax.shapes import PerExample
from deltax.tasks.evaluation import Evaluation
from deltax.tasks.task_spec import TrackSpec

SPLITS = ("train", "validation", "sealed")


class Films(NamedTuple):
    """Tracks, and what no objective sees: how deep the points lie in each image.

    tracks  (B, N, P, 3): x, y on the image plane at distance 1, and 1 where the point is seen, else all 0
    depth   (B, N, P), distance along the axis of the camera
    """

    tracks: Float[Tensor, "B N P 3"]
    depth: Float[Tensor, "B N P"]

    def to(self, device: torch.device | str) -> "Films":
        return Films(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Films]":
        """The batch in `count` pieces along its films."""
        return [Films(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every film counts the same."""
        return torch.ones(len(self.tracks), device=self.tracks.device)


@needs(model=TRACKS_TO_SCENE)
class Tracks:
    """Where were the points, and the camera? The interface is that of `deltax.tasks.language.text.Text`.

    The score is the error in percent of the depth of points that are seen, each film's scale put right by its median;
    `metrics` has the distance on the image, in percent of the distance of the image plane. `modes` is how many ways a
    shape has to deform.
    """

    can_be_zero = ("modes",)
    unit = "% of depth"

    def __init__(self, *, frames: int = 16, points: int = 24, modes: int = 2, held_out: int = 64):
        for name, value in {"frames": frames, "points": points, "held_out": held_out}.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.frames, self.points, self.modes, self.count = frames, points, modes, held_out

    @property
    def task_spec(self) -> TrackSpec:
        return {"frames": self.frames}

    def batch(self, step: int, *, size: int, seed: int) -> Films:
        """New films, each from its own number: Philox keyed by (seed, step) draws these."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(size)
        return self._filmed(draws // np.uint64(2))

    def tokens(self, size: int) -> int:
        return size * self.frames * self.points

    def all(self, split: str = "validation") -> Films:
        """A split as one batch, of films that are never drawn for training. Raises UserError for one not there."""
        if split not in SPLITS[1:]:
            raise UserError(f"no held-out split {split!r}{nearest(split, SPLITS[1:])}: validation or sealed")
        return self._filmed(np.arange(self.count, dtype=np.uint64) + np.uint64(SPLITS.index(split) + 1 << 62))

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Films]:
        """The split in order, `size` films at a time."""
        yield from (Films(*piece) for piece in zip(*(t.split(size) for t in self.all(split)), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "films"]:
        """Every film is a document of its own."""
        return np.arange(self.count)

    def score(self, nats: float) -> float:
        return nats

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        films = self.all(split).to(next(model.parameters()).device)
        scene = model(films.tracks)
        image, depth = scene.seen()
        wrong = depth_error(depth, films).cpu().double().numpy()
        off = image_error(image, films).mean().item()
        metrics = {"% off on the image": off}
        return Evaluation(float(wrong.mean()), wrong, np.ones(len(wrong)), np.arange(len(wrong)), metrics)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the sizes, and over who is seen when in the held-out films."""
        digest = hashlib.sha256(f"{self.frames} {self.points} {self.modes} {self.count}".encode())
        for split in SPLITS[1:]:
            digest.update(self.all(split).tracks[..., 2].numpy().tobytes())
        return digest.hexdigest()[:16]

    def _filmed(self, numbers: np.ndarray) -> Films:
        tracks, depth = zip(*(self._film(int(n)) for n in numbers), strict=True)
        cast = lambda x: torch.from_numpy(np.stack(x).astype(np.float32))
        return Films(cast(tracks), cast(depth))

    def _film(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=number))
        n, p = self.frames, self.points
        time = np.linspace(0, 1, n)
        moving = np.arange(p) < p // 2
        world = np.broadcast_to(rng.uniform(-1, 1, (p, 3)), (n, p, 3)).copy()
        for _ in range(self.modes):
            swing = np.sin(2 * np.pi * (rng.uniform(0.5, 1.5) * time + rng.uniform()))
            world += 0.25 * swing[:, None, None] * rng.standard_normal((p, 3)) * moving[:, None]
        angle = rng.uniform(-1, 1) + rng.choice([-1, 1]) * rng.uniform(0.6, 1.4) * time
        cosine, sine, zero, one = np.cos(angle), np.sin(angle), np.zeros(n), np.ones(n)
        turn = np.stack([[cosine, zero, -sine], [zero, one, zero], [sine, zero, cosine]]).transpose(2, 0, 1)
        seen_from = np.einsum("nij,npj->npi", turn, world)
        seen_from[..., 2] += rng.uniform(3.5, 4.5)
        seen = rng.uniform(size=(n, p)) > 0.1
        image = seen_from[..., :2] / seen_from[..., 2:]
        return np.concatenate([image, seen[..., None]], -1) * seen[..., None], seen_from[..., 2]


def depth_error(depth: Float[Tensor, "B N P"], films: Films) -> PerExample:
    """Mean |depth / true - 1| over points that are seen, in percent, after each film's depths were multiplied by the
    median of true / depth: a film has no scale."""
    depth, seen = depth.clamp(min=1e-3), films.tracks[..., 2] > 0
    ratio = (films.depth / depth).masked_fill(~seen, torch.nan).flatten(1).nanmedian(1).values
    off = (depth * ratio[:, None, None] / films.depth - 1).abs()
    return 100 * (off * seen).sum((1, 2)) / seen.sum((1, 2))


def image_error(image: Float[Tensor, "B N P 2"], films: Films) -> PerExample:
    """Mean distance to where a point is seen, in percent of the distance of the image plane."""
    seen = films.tracks[..., 2]
    return 100 * ((image - films.tracks[..., :2]).norm(dim=-1) * seen).sum((1, 2)) / seen.sum((1, 2))
