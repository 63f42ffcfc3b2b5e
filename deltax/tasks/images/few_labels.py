"""Many pictures, few labels: half of a batch is labelled, or none is and the labels only test what was learned."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.errors import UserError
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.pictures import Pictures

UNLABELLED = -100  # the index that cross-entropy passes over


def wrong(predicted: np.ndarray, labels: np.ndarray, **metrics: float) -> Evaluation:
    """100 for each example told wrongly and 0 for the others: the score is the error in percent."""
    values = 100.0 * (predicted != labels)
    return Evaluation(float(values.mean()), values, np.ones(len(values)), np.arange(len(values)), metrics)


@torch.inference_mode()
def errors(task: Pictures, model: nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
    """What a classifier says of a split and what is right, both (N,)."""
    device = next(model.parameters()).device
    batches = list(task.held_out_batches(256, split))
    said = torch.cat([model(b.images.to(device)).argmax(-1).cpu() for b in batches])
    return said.numpy(), torch.cat([b.labels for b in batches]).numpy()


@needs(model=IMAGES_TO_LOGITS)
class FewLabels(Pictures):
    """`Pictures`, but only `labels` of the training pictures, as evenly over the classes as they go, have theirs.

    The first half of a batch, rounded up, is of these; the rest is of all training pictures, labelled -100. The score
    is the error in percent. Raises UserError where there are fewer labels than classes, or fewer pictures than labels.
    """

    unit = "% error"

    def __init__(
        self,
        *,
        labels: int = 30,
        source: str | None = None,
        size: int | None = None,
        faults: str = "stop",
        held_out: int = 1000,
    ):
        super().__init__(source=source, size=size, faults=faults, held_out=held_out)
        self._labelled = _chosen(self._rows["train"], self._labels, labels)

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """Philox keyed by (seed, step), both in [0, 2**64), draws both halves."""
        draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(size)
        few, all_of = self._labelled, self._rows["train"]
        half = (size + 1) // 2
        rows = np.concatenate(
            [
                few[(draws[:half] % np.uint64(len(few))).astype(int)],
                all_of[(draws[half:] % np.uint64(len(all_of))).astype(int)],
            ]
        )
        images, labels = self._take(rows)
        labels[half:] = UNLABELLED
        return Batch(images, labels)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{len(self._labelled)}"

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        return wrong(*errors(self, model, split))


class LinearProbe(Pictures):
    """`Pictures`, but what counts is how well a linear classifier, told `labels` labels, reads a model's `features`.

    The score is the error in percent of logistic regression, on standardised `model.features(images)` (B, D) of
    `labels` training pictures, evenly over the classes; `metrics` has the objective, and the error of reading what
    the model itself gives, where it learns from that.
    """

    unit = "% error of a linear probe"

    def __init__(
        self,
        *,
        labels: int = 50,
        source: str | None = None,
        size: int | None = None,
        faults: str = "stop",
        held_out: int = 1000,
    ):
        super().__init__(source=source, size=size, faults=faults, held_out=held_out)
        self._labelled = _chosen(self._rows["train"], self._labels, labels)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{len(self._labelled)}"

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        device = next(model.parameters()).device
        metrics = {
            "objective": held_out(self, model, objective, split=split).score,
            "error reading the output": self.probe(lambda images: model(images.to(device)).cpu(), split).score,
        }
        found = self.probe(lambda images: model.features(images.to(device)).cpu(), split)
        found.metrics.update(metrics)
        return found

    @torch.inference_mode()
    def probe(self, features: Callable[[torch.Tensor], torch.Tensor], split: str = "validation") -> Evaluation:
        """How wrongly logistic regression on these features of the labelled pictures tells a split."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known, asked = self._take(self._labelled), self.all(split)
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        reader.fit(features(known.images).double().numpy(), known.labels.numpy())
        return wrong(reader.predict(features(asked.images).double().numpy()), asked.labels.numpy())


def _chosen(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, in turn over the classes: more labels hold the fewer."""
    kinds = np.unique(labels[rows])
    if type(count) is not int or not len(kinds) <= count <= len(rows):
        raise UserError(f"labels is a whole number from {len(kinds)}, one a class, to {len(rows)}, not {count!r}")
    turn = np.empty(len(rows), dtype=int)
    for kind in kinds:
        of = labels[rows] == kind
        turn[of] = np.arange(of.sum())
    return np.sort(rows[np.argsort(turn, kind="stable")[:count]])
