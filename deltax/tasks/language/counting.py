"""How far counting gets: an interpolated n-gram of bytes. A language model that is no better has learned nothing."""

import numpy as np

from deltax.tasks.language.text import SEPARATOR, Text


def counting_bits(task: Text, *, order: int = 3) -> float:
    """Bits per byte of the task's held-out text under n-grams of up to `order` bytes, counted on its training text.

    Witten and Bell's interpolation: P_n(c|h) = (N(hc) + T(h) P_{n-1}(c|h')) / (N(h) + T(h)), with T(h) the number of
    different bytes seen after h and h' the history without its oldest byte, down to the uniform guess.
    """
    corpus = task.corpus
    train = np.concatenate([[SEPARATOR], *(np.append(corpus[i], SEPARATOR) for i in corpus.splits["train"])])
    text, place = _held_out(task)
    chance = np.full(len(text), 1 / 256)
    for n in range(1, order + 1):
        grams, times = np.unique(_grams(train, n), return_counts=True)
        histories, first, kinds = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        total = np.add.reduceat(times, first)
        asked = _grams(text, n)
        seen = _look_up(grams, times, asked)
        after = asked >> np.uint64(8)
        n_h, t_h = _look_up(histories, total, after), _look_up(histories, kinds, after)
        row = np.flatnonzero((n_h > 0) & (place[n - 1 :] >= n - 1))  # a history lies inside its window
        known = row + n - 1
        chance[known] = (seen[row] + t_h[row] * chance[known]) / (n_h[row] + t_h[row])
    return float(-np.log2(chance[place > 0]).mean())


def _held_out(task: Text) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation windows end to end, each after the byte before it, and each byte's place in its window."""
    pieces, places = [], []
    for batch in task.held_out_batches(64):
        for inputs, targets in zip(batch.inputs.numpy(), batch.targets.numpy()):
            length = int((targets >= 0).sum())
            pieces.append(np.concatenate([inputs[:1], targets[:length]]))
            places.append(np.arange(length + 1))
    return np.concatenate(pieces), np.concatenate(places)


def _grams(text: np.ndarray, n: int) -> np.ndarray:
    """Every run of n bytes as one number, the last byte lowest."""
    text = text.astype(np.uint64)
    found = np.zeros(len(text) - n + 1, np.uint64)
    for i in range(n):
        found = (found << np.uint64(8)) | text[i : len(text) - n + 1 + i]
    return found


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
