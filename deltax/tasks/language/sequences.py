"""Small tasks from one sequence to another."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.shapes import PerExample
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.language.text import IGNORED
from deltax.tasks.task_spec import TextSpec

PADDING, START, END, ZERO = 0, 1, 2, 3  # the digit d is the token ZERO + d
_SPLITS = ("validation", "sealed")


class Batch(NamedTuple):
    """What is read, what has been said so far, and what to say next; sources and inputs are padded with 0, targets with
    -100."""

    source: Int64[Tensor, "B S"]
    inputs: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Batch]":
        """The batch in `count` pieces along its examples."""
        return [Batch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """How many targets each example has."""
        return (self.targets >= 0).sum(1).float()


class Reversal:
    """Say a string of digits backwards. The interface is that of `deltax.tasks.language.text.Text`.

    Training strings have 1 to `digits` digits, each length equally often; held-out strings have `digits`, and none of
    them is ever trained on: a string is held out if the sum of its digits, each times its place, is a multiple of 7.
    held_out is how many of them to evaluate on. `metrics` holds "exact match", the share of strings said without a
    mistake, where the model has a `greedy(source, start, length)`.
    """

    unit = "nats per token"

    def __init__(self, *, digits: int = 12, held_out: int = 512):
        for name, value in (("digits", digits), ("held_out", held_out)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.digits, self.held_out = digits, held_out

    @property
    def task_spec(self) -> TextSpec:
        return {"vocab": ZERO + 10, "context": self.digits + 1}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """New strings. Philox keyed by (seed, step), both in [0, 2**64), draws them; a smaller batch is the beginning
        of a larger one."""
        key = np.array([seed, step], dtype=np.uint64)
        raw = np.random.Philox(key=key).random_raw((size, self.digits + 1))
        strings, lengths = (raw[:, 1:] % 10).astype(np.int64), (raw[:, 0] % self.digits + 1).astype(np.int64)
        strings[_is_held_out(strings, lengths), 0] += 1  # changes the sum by 1, or by -9
        return _written(strings % 10, lengths)

    def tokens(self, size: int) -> int:
        """Targets of a batch of strings of mean length: their digits and an end."""
        return round(size * ((1 + self.digits) / 2 + 1))

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """The same strings every time."""
        if split not in _SPLITS:
            raise UserError(f"no held-out split {split!r}{nearest(split, _SPLITS)}: validation or sealed")
        draws = np.random.Generator(np.random.Philox(key=np.array([0, _SPLITS.index(split)], dtype=np.uint64)))
        strings = draws.integers(10, size=(self.held_out * 14 + 200, self.digits))
        lengths = np.full(len(strings), self.digits)
        kept = strings[_is_held_out(strings, lengths)][: self.held_out]
        whole = _written(kept, lengths[: len(kept)])
        yield from (Batch(*piece) for piece in zip(*(tensor.split(size) for tensor in whole), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "strings"]:
        """Every string is a document of its own."""
        return np.arange(sum(len(batch.source) for batch in self.held_out_batches(512, split)))

    def score(self, nats: float) -> float:
        return nats

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        found = held_out(self, model, objective, split=split)
        return replace(
            found, metrics={"exact match": self.exact_match(model, split)} if hasattr(model, "greedy") else {}
        )

    @torch.inference_mode()
    def exact_match(self, model: nn.Module, split: str = "validation") -> float:
        """The share of held-out strings that greedy decoding says right from the first token to the end."""
        device = next(model.parameters()).device
        right = []
        for batch in self.held_out_batches(256, split):
            said = model.greedy(batch.source.to(device), START, batch.targets.shape[1]).cpu()
            right.append((said == batch.targets).all(1))
        return torch.cat(right).double().mean().item()

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the held-out strings and a first batch."""
        digest = hashlib.sha256(f"reversal {self.digits} {self.held_out}".encode())
        for batch in (
            self.batch(0, size=8, seed=0),
            *(b for split in _SPLITS for b in self.held_out_batches(512, split)),
        ):
            digest.update(batch.source.numpy().tobytes())
        return digest.hexdigest()[:16]


def _is_held_out(strings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    places = np.arange(1, strings.shape[1] + 1)
    return (strings * places * (places <= lengths[:, None])).sum(1) % 7 == 0


def _written(strings: np.ndarray, lengths: np.ndarray) -> Batch:
    """Digits (B, N), of which the first `lengths` count, as tokens. The answer is the reversed string and an end."""
    count, digits = strings.shape
    ahead = np.arange(digits + 1)
    inside = ahead < lengths[:, None]
    source = np.where(inside[:, :-1], ZERO + strings, PADDING)
    backwards = np.take_along_axis(source, np.maximum(lengths[:, None] - 1 - ahead, 0), 1)
    targets = np.where(inside, backwards, np.where(ahead == lengths[:, None], END, IGNORED))
    before = np.concatenate([np.full((count, 1), START), targets[:, :-1]], 1)
    inputs = np.where(ahead <= lengths[:, None], before, PADDING)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(t, dtype=np.int64)) for t in (source, inputs, targets)))
