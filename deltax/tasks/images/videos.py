"""Moving digits: scikit-learn's digits fly over a dark field and bounce off its walls, to be drawn again.

After Moving MNIST (Srivastava, Mansimov, Salakhutdinov, 2015, arXiv:1502.04681), with one digit in a video.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.contract import PIXELS_TO_PIXELS, needs
from deltax.errors import UserError
from deltax.shapes import PerExample
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import Digits
from deltax.tasks.task_spec import VideoSpec

DIGIT = 8  # the side of a digit, pixels
FASTEST = 2.0  # pixels a frame along an axis
HELD_OUT = [2**64 - 1, 2**64 - 1]  # the key of held-out ways, no seed and step of training

Videos = Float[Tensor, "B C T Y X"]


class Batch(NamedTuple):
    """Videos with values in [-1, 1], ink high, and the digit that moves in each."""

    videos: Videos
    labels: Int64[Tensor, "B"]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Batch]":
        """The batch in `count` pieces along its examples."""
        return [Batch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every video counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


@needs(model=PIXELS_TO_PIXELS)
class MovingDigits:
    """Videos of `frames` x `size` x `size` in which one digit moves. The interface is that of
    `deltax.tasks.language.text.Text`; the tokens of a batch are its frames.

    Where a digit starts and how fast it goes, up to 2 pixels a frame along each axis, is drawn evenly; it stands at
    whole pixels. The digits of training and of the held-out splits are those of `Digits`; held_out is how many to
    evaluate on, each in one video. frames=1 is a picture. The score is whatever error the objective measures, and
    "psnr" among the metrics is in decibels, of the error over all held-out pixels.
    """

    unit = "error"

    def __init__(self, *, frames: int = 9, size: int = 16, held_out: int = 128):
        for word, number, least in (("frames", frames, 1), ("size", size, DIGIT)):
            if type(number) is not int or number < least:
                raise UserError(f"{word} must be a whole number of at least {least}, not {number!r}")
        self.frames, self.size = frames, size
        self._digits = Digits(held_out=held_out)
        self._train = self._digits.all("train")

    @property
    def task_spec(self) -> VideoSpec:
        return {"channels": 1, "frames": self.frames, "size": self.size, "classes": 10}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """Videos of training digits. Philox keyed by (seed, step), both in [0, 2**64), draws them; a smaller batch is
        the beginning of a larger one."""
        draws = _draws([seed, step], size)
        rows = torch.from_numpy((draws[:, 0] * len(self._train.labels)).astype(np.int64))
        return self._moving(self._train.images[rows], self._train.labels[rows], draws)

    def tokens(self, size: int) -> int:
        return size * self.frames

    def all(self, split: str = "validation") -> Batch:
        """A split as one batch, one video for each of its digits. Raises UserError for a split that is not there."""
        digits = self._digits.all(split)
        return self._moving(*digits, _draws(HELD_OUT, len(digits.labels)))

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """The split in order, `size` videos at a time."""
        yield from (Batch(*piece) for piece in zip(*(tensor.split(size) for tensor in self.all(split)), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "videos"]:
        """Every video is a document of its own."""
        return self._digits.held_out_documents(split)

    def score(self, error: float) -> float:
        return error

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The objective's error, and the "psnr" in `metrics` of a model that gives videos back as `.pixels`."""
        found = held_out(self, model, objective, split=split)
        found.metrics["psnr"] = self.psnr(model, split)
        return found

    @torch.inference_mode()
    def psnr(self, model: nn.Module, split: str = "validation") -> float:
        """10 log10(2^2 / mean squared error) over a split, in decibels."""
        device = next(model.parameters()).device
        wrong = []
        for batch in self.held_out_batches(64, split):
            videos = batch.videos.to(device)
            wrong.append((model(videos).pixels - videos).square().flatten(1).mean(1).cpu())
        error = torch.cat(wrong).double().mean().item()
        return 10 * math.log10(4 / error) if error > 0 else math.inf

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the digits, the size of the videos, and the held-out ones."""
        digest = hashlib.sha256(f"{self._digits.fingerprint} {self.frames} {self.size}".encode())
        digest.update(self.all().videos.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _moving(self, images: Tensor, labels: Tensor, draws: np.ndarray) -> Batch:
        """Digits (B, 1, 8, 8), each on its way."""
        room = self.size - DIGIT
        start, pace = draws[:, None, 1:3] * room, (2 * draws[:, None, 3:5] - 1) * FASTEST
        path = start + pace * np.arange(self.frames)[:, None]  # (B, T, 2)
        if room:
            path = room - np.abs(np.mod(path, 2 * room) - room)
        corner = torch.from_numpy(np.rint(path if room else 0 * path).astype(np.int64))
        y, x = (corner[..., axis, None] + torch.arange(DIGIT) for axis in range(2))
        videos = torch.full((len(images), 1, self.frames, self.size, self.size), -1.0)
        example, frame = torch.arange(len(images))[:, None, None, None], torch.arange(self.frames)[:, None, None]
        videos[example, 0, frame, y[..., :, None], x[..., None, :]] = images[:, 0, None].expand(-1, self.frames, -1, -1)
        return Batch(videos, labels)


def _draws(key: list[int], count: int) -> np.ndarray:
    """Five even draws from [0, 1) for each of `count` videos."""
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(5 * count)
    return (raw >> np.uint64(11)).reshape(count, 5) / 2.0**53
