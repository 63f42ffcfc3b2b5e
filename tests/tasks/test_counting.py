"""The n-gram against its definition, written as loops."""

import math
from collections import Counter

import pytest

from deltax.tasks.language.counting import counting_bits
from deltax.tasks.language.text import SEPARATOR, Text


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counting_is_witten_and_bells_interpolation(tmp_path, order):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} is half of {2 * i}.\n\n" for i in range(1500)))
    task = Text(source=str(path), context=16, held_out=400)
    train = bytes([SEPARATOR]) + b"".join(bytes(task.corpus[i]) + b"\0" for i in task.corpus.splits["train"])
    counts = Counter(train[i - n : i + 1] for n in range(order) for i in range(n, len(train)))
    total, kinds = Counter(), Counter()
    for gram, times in counts.items():
        total[gram[:-1]] += times
        kinds[gram[:-1]] += 1

    def chance(history: bytes, byte: bytes) -> float:
        lower = chance(history[1:], byte) if history else 1 / 256
        if not total[history]:
            return lower
        return (counts[history + byte] + kinds[history] * lower) / (total[history] + kinds[history])

    bits = []
    for batch in task.held_out_batches(7):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
            text = bytes([inputs[0], *(t for t in targets if t >= 0)])
            bits += [-math.log2(chance(text[max(0, i - order + 1) : i], text[i : i + 1])) for i in range(1, len(text))]
    assert counting_bits(task, order=order) == pytest.approx(sum(bits) / len(bits), rel=1e-9)
