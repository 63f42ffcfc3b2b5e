"""Sums that a machine can check: "07+45=" is to be answered "52" and an end. Learnt from answers, or from reward."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.errors import UserError, nearest
from deltax.shapes import PerExample, Tokens
from deltax.tasks.evaluation import Evaluation
from deltax.tasks.language.text import IGNORED, Batch
from deltax.tasks.task_spec import TextSpec

SPLITS = ("train", "validation", "sealed")
WORDS = "0123456789+=;"
PLUS, EQUALS, END = 10, 11, 12


@needs(model=TOKENS_TO_LOGITS)
class Arithmetic:
    """Sums of two numbers of `digits` digits. The interface is that of `tasks.language.text.Text`, and, for a learner
    that is told no more than whether it was right:

    prompts(step, size=, seed=)  (size, P) questions to train on, a pure function of its arguments
    reward(tokens)               (B,) 1 where a question is followed by its answer and an end, else 0
    answer                       the most tokens an answer takes, its end included
    end                          the token that ends an answer; what comes after it does not count

    A fixed draw puts each problem in train (80 %), validation (10 %) or sealed (10 %); no held-out problem is ever
    asked in training. held_out is how many to evaluate on, or all of a split where it has fewer.
    """

    unit = "chance of a wrong answer"
    end = END
    answer: int

    def __init__(self, *, digits: int = 2, held_out: int = 1000):
        if digits not in (1, 2, 3):
            raise UserError(f"digits must be 1, 2 or 3, not {digits!r}")
        if type(held_out) is not int or held_out < 1:
            raise UserError(f"held_out must be a whole number of at least 1, not {held_out!r}")
        self.digits, self.answer, self.question = digits, digits + 2, 2 * digits + 2
        where = _where(digits)
        self._rows = {split: np.flatnonzero(where == i) for i, split in enumerate(SPLITS)}
        for split in SPLITS[1:]:
            rows = self._rows[split]
            self._rows[split] = rows[np.linspace(0, len(rows) - 1, min(held_out, len(rows))).astype(int)]

    @property
    def task_spec(self) -> TextSpec:
        return {"vocab": len(WORDS), "context": self.question + self.answer}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """Training problems with their answers, each equally likely; only an answer and its end are targets."""
        return self._with_answers(self._draw(step, size, seed))

    def prompts(self, step: int, *, size: int, seed: int) -> Tokens:
        """The questions of `batch`. Philox keyed by (seed, step), both in [0, 2**64), draws them."""
        return torch.from_numpy(self._sequences(self._draw(step, size, seed))[:, : self.question])

    def reward(self, tokens: Tokens) -> PerExample:
        """1 where the question is followed by exactly its answer and an end, 0 elsewhere. (B, T) -> (B,)."""
        read = tokens.cpu().numpy()
        digits = read[:, : self.question].reshape(len(read), 2, self.digits + 1)[:, :, :-1]
        problem = digits.reshape(len(read), -1) @ 10 ** np.arange(2 * self.digits)[::-1]
        right = self._sequences(problem)[:, self.question :]
        said = read[:, self.question : self.question + self.answer]
        if said.shape[1] < self.answer:
            said = np.pad(said, ((0, 0), (0, self.answer - said.shape[1])), constant_values=-1)
        over = np.cumsum(right == END, 1) > 1
        return torch.from_numpy(((said == right) | over).all(1)).float().to(tokens.device)

    def tokens(self, size: int) -> int:
        return size * (self.question + self.answer)

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """The split's problems with their answers, `size` at a time."""
        rows = self._of(split)
        for at in range(0, len(rows), size):
            yield self._with_answers(rows[at : at + size])

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "problems"]:
        """Every problem is a document of its own."""
        return np.arange(len(self._of(split)))

    def score(self, wrong: float) -> float:
        return wrong

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The chance that an answer sampled at temperature 1 is wrong, exactly: one less the product of the chances of
        its tokens. `metrics` has both accuracies, sampled and greedy. The objective is not asked.
        """
        chance, greedy = [], []
        device = next(model.parameters()).device
        for batch in self.held_out_batches(256, split):
            logits, counted = model(batch.inputs.to(device)).float().cpu(), batch.targets >= 0
            targets = batch.targets.clamp(min=0)
            said = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
            chance.append((said * counted).sum(1).exp())
            greedy.append(((logits.argmax(-1) == targets) | ~counted).all(1))
        right = torch.cat(chance).double().numpy()
        metrics = {"sampled accuracy": float(right.mean()), "accuracy": torch.cat(greedy).double().mean().item()}
        return Evaluation(
            1 - metrics["sampled accuracy"], 1 - right, np.ones(len(right)), np.arange(len(right)), metrics
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the problems and who is held out."""
        digest = hashlib.sha256(f"{WORDS} {self.digits}".encode())
        for split in SPLITS:
            digest.update(split.encode() + self._rows[split].astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> Int64[Tensor, "T"]:
        """Raises UserError for a sign that is not in the vocabulary."""
        if strange := set(text) - set(WORDS):
            raise UserError(f"{min(strange)!r} is not in the vocabulary of sums, {WORDS}")
        return torch.tensor([WORDS.index(sign) for sign in text], dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        return "".join(WORDS[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids))

    def _draw(self, step: int, size: int, seed: int) -> np.ndarray:
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(size)
        return self._rows["train"][(draws % np.uint64(len(self._rows["train"]))).astype(np.int64)]

    def _with_answers(self, problems: np.ndarray) -> Batch:
        text = self._sequences(problems)
        targets = text[:, 1:].copy()
        targets[:, : self.question - 1] = IGNORED
        targets[:, self.question - 1 :][np.cumsum(text[:, self.question :] == END, 1) > 1] = IGNORED
        return Batch(torch.from_numpy(text[:, :-1].copy()), torch.from_numpy(targets))

    def _sequences(self, problems: np.ndarray) -> Int64[np.ndarray, "B T"]:
        """Question and answer of each problem a * 10^digits + b, filled up with ends."""
        a, b = np.divmod(problems, 10**self.digits)
        return np.array([self._spelt(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], dtype=np.int64)

    def _spelt(self, a: int, b: int) -> list[int]:
        question = f"{a:0{self.digits}}+{b:0{self.digits}}="
        return [WORDS.index(sign) for sign in question + str(a + b).ljust(self.answer, WORDS[END])]

    def _of(self, split: str) -> np.ndarray:
        if split not in SPLITS[1:]:
            raise UserError(f"no held-out split {split!r}{nearest(split, SPLITS[1:])}: validation or sealed")
        return self._rows[split]


@cache
def _where(digits: int) -> np.ndarray:
    """The split of every problem a * 10^digits + b, as an index into SPLITS."""
    keys = np.random.Philox(key=digits).random_raw(10 ** (2 * digits))
    return np.digitize(keys / 2.0**64, (0.80, 0.90))
