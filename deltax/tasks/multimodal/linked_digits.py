"""Digits as tokens of three kinds, of which only pictures with words and words with sounds are ever given together.

    image  4 tokens: the quarters of scikit-learn's handwritten digit, each as the nearest of 64, k-means of the
           training digits' quarters
    word   5 tokens: the letters of its English name, filled up with dots
    sound  8 tokens: the name spelt in tones (`multimodal.sounds`, made here, nobody's voice), the loudest low and the
           loudest high band every 44 ms, the first of each in silence

One half of the training digits has a word, and the words of the other half come with a sound alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.errors import UserError, nearest
from deltax.parts.training.generate import generate
from deltax.shapes import Tokens
from deltax.tasks.evaluation import Evaluation
from deltax.tasks.images.digits import SPLITS, Digits
from deltax.tasks.images.few_labels import wrong
from deltax.tasks.language.text import IGNORED, Batch
from deltax.tasks.multimodal.pairs import WORDS
from deltax.tasks.multimodal.sounds import spectrograms
from deltax.tasks.task_spec import TextSpec

IMAGE, WORD, SOUND = range(3)
KINDS = ("image", "word", "sound")
LENGTHS = (4, 5, 8)
_LETTERS, _CODES = 64, 91  # where the tokens of words and of sounds begin
START, MARK, FILL, PADDING, VOCAB = 155, 158, 159, 160, 161  # START + kind begins a block
Rows = Int64[Tensor, "_ _"]  # sequences of any number and length
Block = tuple[int, Int64[Tensor, "B _"]]  # a kind and its tokens


def spell(*blocks: Block) -> Rows:
    """Blocks one after the other, each behind the start of its kind."""
    starts = [tokens.new_full((len(tokens), 1), START + kind) for kind, tokens in blocks]
    return torch.cat([x for start, (_, tokens) in zip(starts, blocks, strict=True) for x in (start, tokens)], 1)


def padded(sequences: list[Rows], *, last: list[int] | None = None) -> Batch:
    """Sequences of several lengths as one batch; only their `last` so many tokens are targets, or all but the first."""
    longest = max(tokens.shape[1] for tokens in sequences)
    inputs, targets = [], []
    for tokens, count in zip(sequences, last or [longest] * len(sequences), strict=True):
        length = tokens.shape[1]
        tokens = nn.functional.pad(tokens, (0, longest - length), value=PADDING)
        counts = (tokens != PADDING) & (torch.arange(longest, device=tokens.device) >= length - count)
        inputs.append(tokens[:, :-1])
        targets.append(tokens.where(counts, IGNORED)[:, 1:])
    return Batch(torch.cat(inputs), torch.cat(targets))


@needs(model=TOKENS_TO_LOGITS)
class LinkedDigits:
    """How does the name of this picture sound? The interface is that of `deltax.tasks.language.text.Text`.

    `batch` has pairs as a plain language model reads them, image before word and word before sound; `pairs` has them as
    blocks. The score is the error in percent of the sounds that a model makes of held-out pictures, as the nearest of
    many known sounds tells them; `metrics` has those of pairs that were given, and of picture and word together.
    """

    unit = "% error"

    def __init__(self, *, held_out: int = 200):
        if type(held_out) is not int or held_out < 1:
            raise UserError(f"held_out must be a whole number of at least 1, not {held_out!r}")
        digits = Digits(held_out=held_out)
        self._images, self._labels, self._rows = _quantised(), digits._labels, digits._rows

    @property
    def task_spec(self) -> TextSpec:
        return {"vocab": VOCAB, "context": sum(LENGTHS) + 5}

    def pairs(self, step: int, *, size: int, seed: int) -> list[tuple[Block, Block]]:
        """Half of the pairs are image and word, half word and sound of other digits. Philox keyed by (seed, step)
        draws them; a smaller batch is the beginning of a larger one."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(3 * size).reshape(size, 3)
        seen, heard = draws[::2], draws[1::2]
        train = self._rows["train"][::2]
        rows = train[(seen[:, 0] % np.uint64(len(train))).astype(int)]
        others = (heard[:, 1] % np.uint64(10)).astype(int)
        image, word = (IMAGE, self._images[rows]), (WORD, _words(self._labels[rows]))
        return [(image, word), ((WORD, _words(others)), (SOUND, _sounds(others, heard[:, 2])))][: 2 if size > 1 else 1]

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """The pairs of `pairs`, in the order in which they stand there."""
        return padded([spell(*pair) for pair in self.pairs(step, size=size, seed=seed)])

    def tokens(self, size: int) -> int:
        return size * (LENGTHS[IMAGE] + LENGTHS[WORD] + 2)

    def held_out(self, split: str = "validation") -> tuple[list[Block], np.ndarray]:
        """The three blocks of every held-out digit, and the digits. Raises UserError for a split that is not there."""
        if split not in SPLITS[1:]:
            raise UserError(f"no held-out split {split!r}{nearest(split, SPLITS[1:])}: validation or sealed")
        rows = self._rows[split]
        labels = self._labels[rows]
        draws = np.random.Philox(key=SPLITS.index(split)).random_raw(len(rows))
        return [(IMAGE, self._images[rows]), (WORD, _words(labels)), (SOUND, _sounds(labels, draws))], labels

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """Pictures with their sounds, `size` at a time."""
        (image, _, sound), _ = self.held_out(split)
        for piece in spell(image, sound).split(size):
            yield padded([piece])

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "digits"]:
        """Every digit is a document of its own."""
        return np.arange(len(self._rows[split]))

    def score(self, nats: float) -> float:
        return nats

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """What the model makes of held-out blocks, the likeliest token each time. The objective is not asked."""
        device = next(model.parameters()).device
        (image, word, sound), labels = self.held_out(split)
        ways = {
            "image to sound": ([image], SOUND),
            "image and word to sound": ([image, word], SOUND),
            "image to word": ([image], WORD),
            "word to sound": ([word], SOUND),
            "sound to word": ([sound], WORD),
        }
        found = {}
        for way, (given, kind) in ways.items():
            prompt = spell(*given, (kind, given[0][1][:, :0]))
            made = generate(model, prompt.to(device), length=LENGTHS[kind], temperature=0)[:, -LENGTHS[kind] :].cpu()
            found[way] = wrong(read(kind, made), labels)
        first = found["image to sound"]
        first.metrics.update({f"% error, {way}": evaluation.score for way, evaluation in found.items()})
        first.metrics["% error, real sounds"] = wrong(read(SOUND, sound[1]), labels).score
        return first

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the pictures, the names and who is held out."""
        digest = hashlib.sha256(self._images.numpy().tobytes() + repr((WORDS, LENGTHS, START)).encode())
        for split in SPLITS:
            digest.update(split.encode() + self._rows[split].astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def read(kind: int, tokens: Tokens) -> Int64[np.ndarray, "B"]:
    """The digit that words or sounds name, -1 for a word that is none; of a sound the nearest known one's."""
    if kind == WORD:
        same = (tokens[:, None] == _words(np.arange(10))).all(-1)
        return torch.where(same.any(1), same.int().argmax(1), -1).numpy()
    return ((tokens[:, None] != _known()).sum(-1).argmin(1) % 10).numpy()


@cache
def _known() -> Tokens:
    """Thirty sounds of each digit, by speakers that say nothing else."""
    return _sounds(np.tile(np.arange(10), 30), np.random.Philox(key=99).random_raw(300))


@cache
def _quantised() -> Tokens:
    """The quarters of every digit, row by row, as the number of the nearest centre."""
    from sklearn.cluster import KMeans

    digits = Digits()
    quarters = digits._pixels.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(len(digits._pixels), 4, 16).astype(float)
    means = KMeans(_LETTERS, n_init=1, random_state=0).fit(quarters[digits._rows["train"]].reshape(-1, 16))
    return torch.from_numpy(means.predict(quarters.reshape(-1, 16)).reshape(-1, 4).astype(np.int64))


def _words(labels: np.ndarray) -> Tokens:
    letters = [[26 if c == "." else ord(c) - ord("a") for c in WORDS[n].ljust(LENGTHS[WORD], ".")] for n in labels]
    return torch.tensor(letters, dtype=torch.int64).view(-1, LENGTHS[WORD]) + _LETTERS


def _sounds(labels: np.ndarray, draws: np.ndarray) -> Tokens:
    loud = spectrograms([WORDS[n] for n in labels], draws, frames=2 * LENGTHS[SOUND])[..., ::2]
    loud = loud * (loud > 1)  # what is below is hiss
    codes = 8 * loud[:, :8].argmax(1) + loud[:, 8:].argmax(1)
    return torch.from_numpy(codes.astype(np.int64)) + _CODES
