"""The task of 1989 with the digits at hand: a few hundred grey images of 16 by 16, each seen once a pass, in order."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage
from torch import nn

from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.errors import UserError
from deltax.tasks.evaluation import Evaluation
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.few_labels import errors, wrong
from deltax.tasks.images.pictures import Pictures


@needs(model=IMAGES_TO_LOGITS)
class ZipCodes(Pictures):
    """`Pictures` at 16 by 16, but training goes over the first `images` of them in one order, pass after pass.

    The digits are drawn up bilinearly. The score is the error in percent, whatever the objective, so that networks
    trained on different losses can be compared; `metrics` has the training error. Training pictures past the first
    `most` join validation, so that there is more to tell small errors apart by. `turn` turns
    every image, in degrees, counter-clockwise.
    """

    unit = "% error"

    def __init__(
        self,
        *,
        images: int = 300,
        most: int = 1000,
        turn: float = 0.0,
        source: str | None = None,
        faults: str = "stop",
    ):
        super().__init__(source=source, size=16, channels=1, faults=faults)
        train = self._rows["train"]
        for name, value in (("images", images), ("most", most)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if images > min(most, len(train)):
            raise UserError(f"there are {min(most, len(train))} images to train on, not {images}: set images to fewer")
        spare = train[most:]
        order = np.random.Philox(key=np.array([0, len(train)], dtype=np.uint64)).random_raw(min(most, len(train)))
        self._rows["train"] = train[:most][np.argsort(order, kind="stable")][:images]
        self._rows["validation"] = np.union1d(self._rows["validation"], spare)
        if turn:
            self._pixels = ndimage.rotate(self._pixels, turn, axes=(2, 1), reshape=False, order=1, mode="nearest")

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """The next `size` images of the pass, the same for every seed."""
        train = self._rows["train"]
        return self._take(train[(step * size + np.arange(size)) % len(train)])

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        said, right = errors(self, model, "train")
        return wrong(*errors(self, model, split), **{"training error": 100 * float((said != right).mean())})
