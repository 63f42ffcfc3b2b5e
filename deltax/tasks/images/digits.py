"""scikit-learn's handwritten digits, 1797 grey images of 8 by 8: to be told apart, or to be drawn.

They come with scikit-learn (E. Alpaydin, C. Kaynak, UCI, 1998), so no run waits for a download.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.shapes import Images, PerExample
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.task_spec import ImageSpec

SPLITS = ("train", "validation", "sealed")


class Batch(NamedTuple):
    """Images with values in [-1, 1], ink high, and the digit that each shows."""

    images: Images
    labels: Int64[Tensor, "B"]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Batch]":
        """The batch in `count` pieces along its examples."""
        return [Batch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every image counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


class Digits:
    """Which digit is it? The interface is that of `tasks.language.text.Text`; the tokens of a batch are its images.

    An image's own pixels put it in train (70 %), validation (15 %) or sealed (15 %). held_out is how many images to
    evaluate on, and examples how many to train on, or all of a split where it has fewer.
    """

    unit = "nats"

    def __init__(self, *, held_out: int = 1000, examples: int = 10_000):
        for word, count in {"held_out": held_out, "examples": examples}.items():
            if type(count) is not int or count < 1:
                raise UserError(f"{word} must be a whole number of at least 1, not {count!r}")
        self._pixels, self._labels = _load()
        rows = _split(self._pixels)
        self._rows = {split: of[: examples if split == "train" else held_out] for split, of in rows.items()}

    @property
    def task_spec(self) -> ImageSpec:
        return {"channels": 1, "size": 8, "classes": 10}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """Images of the training split, each drawn with equal chance. Philox keyed by (seed, step), both in
        [0, 2**64), draws them; a smaller batch is the beginning of a larger one."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(size)
        train = self._rows["train"]
        return self._take(train[(draws % np.uint64(len(train))).astype(np.int64)])

    def tokens(self, size: int) -> int:
        return size

    def all(self, split: str = "validation") -> Batch:
        """A split as one batch. Raises UserError for a split that is not there."""
        if split not in self._rows:
            raise UserError(f"no split {split!r}{nearest(split, SPLITS)}: train, validation or sealed")
        return self._take(self._rows[split])

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """The split in order, `size` images at a time."""
        yield from (Batch(*piece) for piece in zip(*(tensor.split(size) for tensor in self.all(split)), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "images"]:
        """Every image is a document of its own."""
        return np.arange(len(self.all(split).labels))

    def score(self, nats: float) -> float:
        return nats

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The loss, and in `metrics` the accuracy of a model that gives images (B, 1, 8, 8) logits (B, 10)."""
        return replace(held_out(self, model, objective, split=split), metrics={"accuracy": self.accuracy(model, split)})

    @torch.inference_mode()
    def accuracy(self, model: Callable[[Images], Float[Tensor, "B V"]], split: str = "validation") -> float:
        """The share of a split's images whose highest logit is that of their digit."""
        device = next((p.device for p in model.parameters()), "cpu") if isinstance(model, nn.Module) else "cpu"
        right = [model(b.images.to(device)).argmax(-1).cpu() == b.labels for b in self.held_out_batches(256, split)]
        return torch.cat(right).double().mean().item()

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the images, their labels and who is held out."""
        digest = hashlib.sha256(self._pixels.tobytes() + self._labels.astype("<i8").tobytes())
        for split in SPLITS:
            digest.update(split.encode() + self._rows[split].astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _take(self, rows: np.ndarray) -> Batch:
        images = torch.from_numpy(self._pixels[rows].astype(np.float32)) / 8 - 1
        return Batch(images[:, None], torch.from_numpy(self._labels[rows].astype(np.int64)))


class DigitDrawings(Digits):
    """The same images, to be drawn: the score is whatever error the objective measures."""

    unit = "squared error"

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        return held_out(self, model, objective, split=split)


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 8, 8) from 0 to 16 as bytes, labels (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8), data.target


def _split(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices by split, ascending. Equal images share one."""
    keys = [int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") for image in pixels]
    where = np.digitize(np.array(keys) / 2.0**64, (0.70, 0.85))
    return {split: np.flatnonzero(where == i) for i, split in enumerate(SPLITS)}
