"""Text as bytes: predict each next byte. Nothing to tokenise, so every corpus is scored in the same unit."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.language.corpus import SPLITS, Corpus
from deltax.tasks.language.sources import load
from deltax.tasks.task_spec import TextSpec

SEPARATOR = 0
IGNORED = -100  # what torch's cross entropy leaves out by default


class Batch(NamedTuple):
    """What a model reads, and what it should say next; a target of -100 counts for nothing."""

    inputs: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Batch]":
        """The batch in `count` pieces along its examples."""
        return [Batch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> Float[Tensor, "B"]:
        """How many targets each example has."""
        return (self.targets >= 0).sum(1).float()


class Windows(NamedTuple):
    """Evaluation windows, one row each: where its targets start in the corpus, how many, of which document."""

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    first: np.ndarray  # whether the window opens its document


class Text:
    """Next-byte prediction on a source of text. The interface of every task:

    task_spec                      what a model's constructor is told
    batch(step, size=, seed=)      training data, a pure function of its arguments: no state, so a resumed run goes on
                                   exactly and the runs of a pair see the same data
    tokens(size)                   training tokens in such a batch, for budgets
    held_out_batches(size, split)  the same evaluation sequences in the same order, whatever the size
    held_out_documents(split)      for each of these sequences the document it comes from, for clustering errors
    unit, score(nats)              how the mean loss over target tokens is reported
    evaluate(model, objective)     an `Evaluation` on the held-out data: lower scores are better
    fingerprint                    changes when the data, or what is asked about it, changes

    source is what `language.sources.load` takes; context is the length of a sequence; held_out is how many bytes to
    evaluate on, or all of a split where it has fewer. Raises UserError for a source that cannot be read, or too small
    for one training and one evaluation sequence.
    """

    unit = "bits per byte"

    def __init__(self, *, source: str | None = None, context: int = 128, held_out: int = 163_840):
        if source is not None and not isinstance(source, str):
            raise UserError(f"source is written as a string, not {type(source).__name__}: give str(source)")
        for name, value in (("context", context), ("held_out", held_out)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.context = context
        self.corpus = load(source)
        self._stream = _stream(self.corpus)
        self._held_out = {split: _select(self.corpus, split, context, held_out) for split in SPLITS[1:]}
        available = int(np.diff(self.corpus.offsets)[self.corpus.splits["validation"]].sum())
        most = min(len(self._stream) - 1, available)
        if context > most:
            raise UserError(
                f"{self.corpus.name} is too small for sequences of {context} bytes, with {len(self._stream) - 1} "
                f"to train and {available} to evaluate on: give more text, or a context of at most {most}"
            )

    @property
    def task_spec(self) -> TextSpec:
        return {"vocab": 256, "context": self.context}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """Windows that start anywhere, each start equally likely, in the training documents with a 0 byte (documents
        have none) before, between and after them. Philox keyed by (seed, step), both in [0, 2**64), draws the starts;
        a smaller batch is the beginning of a larger one."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(size)
        starts = (draws % np.uint64(len(self._stream) - self.context)).astype(np.int64)
        windows = self._stream[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        return Batch(torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy()))

    def tokens(self, size: int) -> int:
        return size * self.context

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """Windows that do not overlap and stay in one document. Every byte of a window is a target once; the first of
        a document is predicted from the separator. A short tail is padded: inputs 0, targets -100."""
        rows = self._rows(split)
        for at in range(0, len(rows.start), size):
            start, length, _, first = (column[at : at + size, None] for column in rows)
            ahead = np.arange(self.context)
            inside = ahead < length
            here = np.where(inside, start + ahead, start)
            text = self.corpus.documents
            targets = np.where(inside, text[here].astype(np.int64), IGNORED)
            before = np.where(first & (ahead == 0), SEPARATOR, text[np.maximum(here - 1, 0)])
            inputs = np.where(inside, before, SEPARATOR).astype(np.int64)
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "sequences"]:
        """For each evaluation sequence the index of its document in `corpus.names`."""
        return self._rows(split).document

    def score(self, nats_per_byte: float) -> float:
        return nats_per_byte / math.log(2)

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        return held_out(self, model, objective, split=split)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the corpus, the context and the evaluation windows."""
        digest = hashlib.sha256(f"{self.corpus.fingerprint} {self.context}".encode())
        for rows in self._held_out.values():
            digest.update(rows.start.astype("<i8").tobytes() + rows.length.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> Int64[Tensor, "T"]:
        return torch.tensor(list(text.encode(errors="replace")), dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        return bytes(ids.tolist() if isinstance(ids, Tensor) else ids).decode(errors="replace")

    def _rows(self, split: str) -> Windows:
        if split not in self._held_out:
            raise UserError(f"no held-out split {split!r}{nearest(split, self._held_out)}: validation or sealed")
        rows = self._held_out[split]
        if not rows.start.size:
            raise UserError(f"{self.corpus.name} has too few documents for a {split} split: give more of them")
        return rows


def _stream(corpus: Corpus) -> np.ndarray:
    pieces = [np.array([SEPARATOR], dtype=np.uint8)]
    for i in corpus.splits["train"]:
        pieces += corpus[i], pieces[0]
    return np.concatenate(pieces)


def _select(corpus: Corpus, split: str, context: int, held_out: int) -> Windows:
    """Windows evenly spaced over the split's documents, as few as hold `held_out` targets: each document is seen in
    proportion to its length."""
    documents = corpus.splits[split]
    size = np.diff(corpus.offsets)[documents]
    count = -(-size // context)
    row = np.repeat(np.arange(len(documents)), count)
    at = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)) * context
    length = np.minimum(size[row] - at, context)
    windows = Windows(corpus.offsets[documents[row]] + at, length, documents[row], at == 0)
    total = len(row)
    wanted = min(total, -(-held_out * total // max(1, int(length.sum()))))
    while wanted < total and length[_evenly(wanted, total)].sum() < held_out:
        wanted += 1
    return Windows(*(column[_evenly(wanted, total)] for column in windows))


def _evenly(wanted: int, total: int) -> np.ndarray:
    """The middles of `wanted` equal parts of range(total); all of it when they are equal."""
    return (2 * np.arange(wanted) + 1) * total // max(1, 2 * wanted)
