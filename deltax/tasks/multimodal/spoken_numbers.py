"""Numbers of two digits as pictures, texts and sounds, of which texts and sounds are never given for one and the same.

The pictures are two of scikit-learn's handwritten digits side by side. The texts are written here, and so are the
sounds: "four seven" is spelt in the tones of `multimodal.sounds`. Half of the training digits come with a text, the
other half with a sound. So whether a sound finds its text asks for what no pair has shown.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.parts.numerics.precision import similarity
from deltax.shapes import Images, PerExample, Tokens
from deltax.tasks.evaluation import Evaluation
from deltax.tasks.images.digits import SPLITS, Digits
from deltax.tasks.images.few_labels import wrong
from deltax.tasks.multimodal.pairs import END, WORDS, tokenise
from deltax.tasks.multimodal.sounds import BANDS, HOP, RATE, WIDTH, spectrograms
from deltax.tasks.task_spec import BoundSpec

NAMES = tuple(f"{a} {b}" for a in WORDS for b in WORDS)
WORDINGS = ("{}", "number {}", "the digits {}")
FRAMES = 32
CONTEXT = 26


class BoundBatch(NamedTuple):
    """Pictures with texts, and other pictures with sounds.

    images, texts   (B, 1, 8, 16) in [-1, 1] and (B, T): the pairs of the one half
    others, sounds  (B, 1, 8, 16) and (B, 1, bands, frames): the pairs of the other half
    labels, heard   (B,), the numbers of both, which no objective sees
    """

    images: Images
    texts: Tokens
    others: Images
    sounds: Float[Tensor, "B 1 bands frames"]
    labels: Int64[Tensor, "B"]
    heard: Int64[Tensor, "B"]

    def to(self, device: torch.device | str) -> "BoundBatch":
        return BoundBatch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[BoundBatch]":
        """The batch in `count` pieces along its examples."""
        return [BoundBatch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every pair counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


class SpokenNumbers:
    """Which of 64 different numbers is it? The interface is that of `deltax.tasks.language.text.Text`.

    The score is the error in percent of finding a picture's text. `metrics` has that of every other way for models
    that `hear(sounds)`, as `see` and `read` give vectors of length one; "sound to text" is of pairs never seen. Each
    of `groups` held-out groups has 64 numbers, of digits that no training picture has, and each its own speaker.
    """

    unit = "% error"

    def __init__(self, *, groups: int = 8):
        if type(groups) is not int or groups < 1:
            raise UserError(f"groups must be a whole number of at least 1, not {groups!r}")
        digits = Digits(held_out=10_000)
        self._pixels, self._labels, self.groups = digits._pixels, digits._labels, groups
        rows = {split: digits._rows[split] for split in SPLITS}
        rows |= {"read": rows["train"][::2], "heard": rows["train"][1::2]}
        self._of = {name: [of[self._labels[of] == digit] for digit in range(10)] for name, of in rows.items()}

    @property
    def task_spec(self) -> BoundSpec:
        return {
            "channels": 1,
            "size": (8, 16),
            "vocab": END + 1,
            "context": CONTEXT,
            "spectrogram": (BANDS, FRAMES),
        }

    def batch(self, step: int, *, size: int, seed: int) -> BoundBatch:
        """Numbers each with equal chance, with any training digits of their half, wording and speaker. Philox keyed by
        (seed, step) draws them; a smaller batch is the beginning of a larger one."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(8 * size).reshape(size, 8)
        labels, heard = ((draws[:, i] % np.uint64(len(NAMES))).astype(np.int64) for i in (0, 4))
        images, others = self._shown("read", labels, draws[:, 1:3]), self._shown("heard", heard, draws[:, 5:7])
        texts, sounds = _written(labels, draws[:, 3]), _said(heard, draws[:, 7])
        return BoundBatch(images, texts, others, sounds, torch.from_numpy(labels), torch.from_numpy(heard))

    def tokens(self, size: int) -> int:
        """A picture is one token, and a batch has as many with a sound as with a text."""
        return 2 * size

    def all(self, split: str = "validation") -> BoundBatch:
        """All groups of a split, one after the other: each number has picture, text and sound, others being images.

        Raises UserError for a split that is not there.
        """
        if split not in SPLITS:
            raise UserError(f"no split {split!r}{nearest(split, SPLITS)}: train, validation or sealed")
        rng = np.random.Generator(np.random.Philox(key=SPLITS.index(split)))
        labels = np.concatenate([rng.permutation(len(NAMES))[:64] for _ in range(self.groups)])
        draws = rng.integers(2**62, size=(len(labels), 4)).astype(np.uint64)
        images, same = self._shown(split, labels, draws[:, :2]), torch.from_numpy(labels)
        return BoundBatch(images, _written(labels, draws[:, 2]), images, _said(labels, draws[:, 3]), same, same)

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[BoundBatch]:
        """The split in order, `size` numbers at a time."""
        pieces = zip(*(tensor.split(size) for tensor in self.all(split)), strict=True)
        yield from (BoundBatch(*piece) for piece in pieces)

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "numbers"]:
        """Every number asked for is a document of its own."""
        return np.arange(64 * self.groups)

    def score(self, nats: float) -> float:
        return nats

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        batch = self.all(split).to(next(model.parameters()).device)
        senses = {"image": model.see(batch.images), "text": model.read(batch.texts)}
        if hasattr(model, "hear"):
            senses["sound"] = model.hear(batch.sounds)
        senses = {name: vectors.unflatten(0, (-1, 64)) for name, vectors in senses.items()}
        ways = [(a, b) for a in senses for b in senses if a != b]
        found = {way: found_among(*(senses[name] for name in way)) for way in ways}
        first = found["image", "text"]
        first.metrics.update({f"% error, {a} to {b}": evaluation.score for (a, b), evaluation in found.items()})
        if "sound" in senses:
            both = nn.functional.normalize(senses["sound"] + senses["image"], dim=-1)
            first.metrics["% error, sound and image to text"] = found_among(both, senses["text"]).score
        return first

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the held-out pictures, texts and numbers, the kind of sounds and the training halves."""
        digest = hashlib.sha256(f"{RATE} {BANDS} {WIDTH} {HOP} {FRAMES} {self.groups} {WORDINGS}".encode())
        for split in SPLITS[1:]:
            images, texts, *_, labels = self.all(split)
            for tensor in (images, texts, labels):
                digest.update(tensor.numpy().tobytes())
        for half in ("read", "heard"):
            digest.update(np.concatenate(self._of[half]).astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _shown(self, split: str, labels: np.ndarray, draws: np.ndarray) -> Images:
        """Two digits of the split for each number, side by side."""
        sides = []
        for digits, draw in zip(np.divmod(labels, 10), draws.T, strict=True):
            rows = [of[int(d % np.uint64(len(of)))] for of, d in zip((self._of[split][n] for n in digits), draw)]
            sides.append(self._pixels[rows])
        return torch.from_numpy(np.concatenate(sides, 2)[:, None].astype(np.float32)) / 8 - 1


def found_among(asking: Float[Tensor, "G N K"], answers: Float[Tensor, "G N K"]) -> Evaluation:
    """Whether each vector's nearest answer in its group is its own, as an error in percent."""
    nearest_ = similarity(asking, answers).argmax(-1).flatten().cpu().numpy()
    return wrong(nearest_, np.tile(np.arange(answers.shape[1]), len(answers)))


def _written(labels: np.ndarray, draws: np.ndarray) -> Tokens:
    which = (draws % np.uint64(len(WORDINGS))).astype(int)
    texts = [WORDINGS[w].replace("{}", NAMES[n]) for w, n in zip(which, labels, strict=True)]
    return torch.from_numpy(tokenise(texts, CONTEXT))


def _said(labels: np.ndarray, draws: np.ndarray) -> Float[Tensor, "B 1 bands frames"]:
    return torch.from_numpy(spectrograms([NAMES[n] for n in labels], draws, frames=FRAMES))[:, None]
