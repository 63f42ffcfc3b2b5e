"""Pictures and what is said of them: which caption belongs to which picture?

The digits' captions are sentences of bytes, written here: "a photo of the number seven" for a seven, in several
wordings, of which some are kept for asking. A user's pairs are read by `deltax.tasks.multimodal.captions`.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.shapes import Images, PerExample, Tokens
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import SPLITS
from deltax.tasks.images.few_labels import wrong
from deltax.tasks.images.pictures import Pictures
from deltax.tasks.multimodal.captions import load
from deltax.tasks.task_spec import PairSpec

END = 256  # after the bytes; it ends a text and fills the context
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("{}", "a {}", "the digit {}", "number {}", "a photo of the number {}", "this is a {}", "{}, by hand")
UNSEEN_WORDINGS = ("a picture of a {}", "somebody wrote {}", "the number {}")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.1, 0.1, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "purple": (0.9, 0.1, 0.9),
}


def tokenise(texts: list[str], context: int) -> np.ndarray:
    """Texts as bytes in UTF-8, cut to leave room for one END, and filled with END: int64 (N, context)."""
    tokens = np.full((len(texts), context), END, dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        said = text.encode()[: context - 1]
        row[: len(said)] = np.frombuffer(said, dtype=np.uint8)
    return tokens


class PairBatch(NamedTuple):
    """Images with values in [-1, 1], the text of each as tokens, and its class or the number of its caption."""

    images: Images
    texts: Tokens
    labels: Int64[Tensor, "B"]

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[PairBatch]":
        """The batch in `count` pieces along its examples."""
        return [PairBatch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every pair counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


Prompts = Int64[Tensor, "V P T"]


@torch.inference_mode()
def zero_shot(model: Any, images: Images, prompts: Prompts) -> Int64[Tensor, "B"]:
    """The class whose prompts lie nearest, their vectors averaged and brought to length one (CLIP, section 3.1.4).

    `model.see(images)` and `model.read(texts)` give vectors of length one.
    """
    device = next(model.parameters()).device
    read = [model.read(each.to(device)) for each in prompts.flatten(0, 1).split(256)]
    classes = of_length_one(torch.cat(read).unflatten(0, prompts.shape[:2]).mean(1))
    return torch.cat([similarity(model.see(some.to(device)), classes).argmax(-1).cpu() for some in images.split(256)])


class Pairs:
    """Pictures with captions; the score is the error, in percent, of picking each held-out picture's caption.

    source None: digits, each told from the other nine by captions in the wordings trained on; `metrics` has the error
    in wordings that never were. Otherwise a user's pairs, told from all captions that are held out. A text is cut to
    `context` tokens. `faults` is "stop" or "skip". The interface is that of `deltax.tasks.language.text.Text`.
    """

    unit = "% error"

    def __init__(
        self,
        *,
        source: str | None = None,
        size: int | None = None,
        context: int = 32,
        faults: str = "stop",
        held_out: int = 1000,
    ):
        if type(context) is not int or context < 2:
            raise UserError(f"context must be a whole number of at least 2, not {context!r}")
        digits = Pictures(size=size, held_out=held_out)
        self.context, self._captions = context, ()
        self._pixels, self._half, self._rows, self._labels = digits._pixels, digits._half, digits._rows, digits._labels
        self.names, self.skipped = WORDS, ()
        if source not in (None, "digits"):
            album = load(str(source), size=size or 32, faults=faults)
            self._pixels, self._half, self._captions = album.pixels, 127.5, album.captions
            self._rows = {split: of if split == "train" else of[:held_out] for split, of in album.rows.items()}
            self.names, self.skipped = tuple(dict.fromkeys(album.captions)), album.skipped
            self._labels = np.array([self.names.index(caption) for caption in album.captions])

    _captions: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def task_spec(self) -> PairSpec:
        _, size, _, channels = self._pixels.shape
        return {"channels": channels, "size": size, "vocab": END + 1, "context": self.context}

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the pictures, what is said of them and who is held out."""
        digest = hashlib.sha256(np.ascontiguousarray(self._pixels).tobytes() + self._labels.astype("<i8").tobytes())
        digest.update("\n".join((*self._captions, *WORDINGS, *UNSEEN_WORDINGS, str(self.context))).encode())
        for split in SPLITS:
            digest.update(split.encode() + self._rows[split].astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int, *, size: int, seed: int) -> PairBatch:
        """Pairs of the training split, each drawn with equal chance, and a wording for each. Philox keyed by (seed,
        step) draws them; a smaller batch is the beginning of a larger one."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(2 * size).reshape(size, 2)
        train = self._rows["train"]
        return self._pairs(train[(draws[:, 0] % np.uint64(len(train))).astype(int)], draws[:, 1])

    def tokens(self, size: int) -> int:
        """A pair is one token, as an image is."""
        return size

    def all(self, split: str = "validation") -> PairBatch:
        """A split as one batch, the wordings in turn. Raises UserError for a split that is not there."""
        if split not in self._rows:
            raise UserError(f"no split {split!r}{nearest(split, SPLITS)}: train, validation or sealed")
        rows = self._rows[split]
        return self._pairs(rows, np.arange(len(rows), dtype=np.uint64))

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[PairBatch]:
        """The split in order, `size` pairs at a time."""
        pieces = zip(*(tensor.split(size) for tensor in self.all(split)), strict=True)
        yield from (PairBatch(*piece) for piece in pieces)

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "pairs"]:
        """Every pair is a document of its own."""
        return np.arange(len(self._rows[split]))

    def score(self, nats: float) -> float:
        return nats

    def prompts(self) -> dict[str, Prompts]:
        """What a picture is compared with: tokens for each class and wording. The first is what the score is of."""
        if self._captions:
            return {"captions": self._tokens(("{}",))}
        return {
            "wordings trained on": self._tokens(WORDINGS),
            "wordings never seen": self._tokens(UNSEEN_WORDINGS),
        }

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        batch = self.all(split)
        asked = batch.labels.unique() if self._captions else torch.arange(len(self.names))
        found = {
            name: wrong(asked[zero_shot(model, batch.images, prompts[asked])].numpy(), batch.labels.numpy())
            for name, prompts in self.prompts().items()
        }
        first = next(iter(found.values()))
        first.metrics.update({f"% error, {name}": evaluation.score for name, evaluation in found.items()})
        first.metrics["objective"] = held_out(self, model, objective, split=split).score
        return first

    def _pairs(self, rows: np.ndarray, draws: np.ndarray) -> PairBatch:
        labels = self._labels[rows]
        wordings = ("{}",) if self._captions else WORDINGS
        return self._said(self._images(rows), labels, wordings, draws)

    def _images(self, rows: np.ndarray) -> Images:
        return torch.from_numpy(self._pixels[rows]).movedim(-1, 1).float() / self._half - 1

    def _said(self, images: Images, labels: np.ndarray, wordings: tuple[str, ...], draws: np.ndarray) -> PairBatch:
        which = (draws % np.uint64(len(wordings))).astype(int)
        texts = [wordings[w].replace("{}", self.names[label]) for w, label in zip(which, labels, strict=True)]
        return PairBatch(
            images, torch.from_numpy(tokenise(texts, self.context)), torch.from_numpy(labels.astype(np.int64))
        )

    def _tokens(self, wordings: tuple[str, ...]) -> Prompts:
        flat = [wording.replace("{}", name) for name in self.names for wording in wordings]
        return torch.from_numpy(tokenise(flat, self.context)).unflatten(0, (len(self.names), -1))


class ColouredPairs(Pairs):
    """Digits in five colours on black, with captions as "the digit red seven"; each digit lacks one colour in training,
    and the score is the error in percent of telling these unseen ones from all 50 names."""

    def __init__(self, *, size: int | None = None, context: int = 40, held_out: int = 1000):
        super().__init__(size=size, context=context, held_out=held_out)
        self.names = tuple(f"{colour} {word}" for word in WORDS for colour in COLOURS)

    @property
    def task_spec(self) -> PairSpec:
        return {**super().task_spec, "channels": 3}

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{hashlib.sha256(repr(COLOURS).encode()).hexdigest()[:8]}"

    def batch(self, step: int, *, size: int, seed: int) -> PairBatch:
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(3 * size).reshape(size, 3)
        rows = self._rows["train"][(draws[:, 0] % np.uint64(len(self._rows["train"]))).astype(int)]
        others = 1 + (draws[:, 2] % np.uint64(len(COLOURS) - 1)).astype(int)
        return self._coloured(rows, others, draws[:, 1])

    def _pairs(self, rows: np.ndarray, draws: np.ndarray) -> PairBatch:
        return self._coloured(rows, np.zeros(len(rows), dtype=int), draws)

    def _coloured(self, rows: np.ndarray, away: np.ndarray, draws: np.ndarray) -> PairBatch:
        """Each digit in the colour `away` places from the one that it lacks in training."""
        digits, count = self._labels[rows], len(COLOURS)
        colours = (digits + away) % count
        ink = (self._images(rows) + 1) / 2
        tint = torch.tensor(list(COLOURS.values()))[torch.from_numpy(colours)]
        return self._said(2 * ink * tint[:, :, None, None] - 1, digits * count + colours, WORDINGS, draws)
