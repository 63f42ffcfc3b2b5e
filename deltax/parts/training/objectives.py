"""What a run minimises. An objective gives one loss for each example; the loop takes the mean."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltax.contract import IMAGES_TO_LOGITS, SOURCE_TO_LOGITS, TOKENS_TO_LOGITS, needs
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Logits, PerExample, Tokens


@needs("inputs", "targets", model=TOKENS_TO_LOGITS)
def next_token(model: nn.Module, batch: Any) -> PerExample:
    """Mean cross-entropy of each sequence, in nats a token. Targets of -100 do not count."""
    return per_sequence(model(batch.inputs), batch.targets)


@needs("source", "inputs", "targets", model=SOURCE_TO_LOGITS)
def next_token_given_source(model: nn.Module, batch: Any) -> PerExample:
    """`next_token` of a model that has read the source: each true token is shown once it was to be predicted."""
    return per_sequence(model(batch.source, batch.inputs), batch.targets)


@needs("images", "labels", without=("boxes",), model=IMAGES_TO_LOGITS)
def classify(model: nn.Module, batch: Any) -> PerExample:
    """Cross-entropy of each example's label in nats, of a model that gives images (B, C, Y, X) logits (B, V)."""
    return nn.functional.cross_entropy(at_least_float32(model(batch.images)), batch.labels, reduction="none")


@needs("images", "labels", without=("boxes",), model=IMAGES_TO_LOGITS)
def classify_softly(model: nn.Module, batch: Any, *, smoothing: float = 0.1) -> PerExample:
    """`classify`, but a share `smoothing` of each label is spread evenly over all classes."""
    logits = at_least_float32(model(batch.images))
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)


def per_sequence(
    logits: Logits, targets: Tokens, *, losses: Callable[..., Tensor] = nn.functional.cross_entropy
) -> PerExample:
    """The mean of each sequence's losses, in nats; `losses` gives one for each token, as cross_entropy does."""
    each = losses(at_least_float32(logits.flatten(0, 1)), targets.flatten(), reduction="none")
    counted = (targets >= 0).sum(1).clamp(min=1)
    return each.view_as(targets).sum(1) / counted
