"""Two marks side by side, across the line in the middle of the image: are they alike?"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.errors import UserError
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import Batch
from deltax.tasks.task_spec import ImageSpec


@needs(model=IMAGES_TO_LOGITS)
class Borders:
    """Images of zeros, `size` pixels wide, with a mark of 1 or -1 on each side of the middle, in a row drawn at random.

    The label is 1 where the two are alike. Either mark alone says nothing of it, so of all sums of what is seen on the
    left and what is seen on the right the guess of one half is best, a loss of ln 2; its sign may still be right three
    times in four, by luck. The interface is that of `deltax.tasks.language.text.Text`.
    """

    unit = "nats"

    def __init__(self, *, size: int = 8, held_out: int = 512):
        if size < 2 or size % 2:
            raise UserError(f"a line in the middle takes an even size, not {size}")
        self.size, self.held_out = size, held_out

    @property
    def task_spec(self) -> ImageSpec:
        return {"channels": 1, "size": self.size, "classes": 2}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """`size` images drawn from Philox keyed by (seed, step), both in [0, 2**63)."""
        return self._drawn(np.random.Philox(key=np.array([seed, 2 * step], dtype=np.uint64)), size)

    def tokens(self, size: int) -> int:
        return size

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """Images of keys that no step draws from, `size` at a time. Raises UserError for a split that is not there."""
        if split not in ("validation", "sealed"):
            raise UserError(f"no split {split!r}: validation or sealed; training images are drawn by `batch`")
        key = np.array([0 if split == "validation" else 1, 1], dtype=np.uint64)
        everything = self._drawn(np.random.Philox(key=key), self.held_out)
        yield from (Batch(*piece) for piece in zip(*(tensor.split(size) for tensor in everything), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "images"]:
        """Every image is a document of its own."""
        return np.arange(self.held_out)

    def score(self, nats: float) -> float:
        return nats

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The loss, and in `metrics` the accuracy of a model that gives logits (B, 2)."""
        with torch.inference_mode():
            device = next(model.parameters()).device
            batches = (batch.to(device) for batch in self.held_out_batches(256, split))
            right = [(model(batch.images).argmax(-1) == batch.labels).cpu() for batch in batches]
        accuracy = torch.cat(right).double().mean().item()
        return replace(held_out(self, model, objective, split=split), metrics={"accuracy": accuracy})

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the held-out images."""
        digest = hashlib.sha256()
        for split in ("validation", "sealed"):
            for batch in self.held_out_batches(self.held_out, split):
                digest.update(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _drawn(self, bits: np.random.Philox, count: int) -> Batch:
        draws = np.random.Generator(bits).integers(0, [self.size, 2, 2], size=(count, 3))
        row, left, right = torch.from_numpy(draws).T
        images, each = torch.zeros(count, 1, self.size, self.size), torch.arange(count)
        images[each, 0, row, self.size // 2 - 1] = 2.0 * left - 1
        images[each, 0, row, self.size // 2] = 2.0 * right - 1
        return Batch(images, (left == right).long())
