"""What a run minimises. An objective gives one loss for each example; the loop takes the mean.

A batch may be cut into pieces, computed one after the other or on several processes. For most objectives and parts the
mean over all pieces is the mean over the batch. Two kinds are declared, by `over_tokens` and `mixes`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from deltax.contract import IMAGES_TO_LOGITS, SOURCE_TO_LOGITS, TOKENS_TO_LOGITS, needs
from deltax.parts.numerics.precision import at_least_float32
from deltax.recipe import Part
from deltax.shapes import Logits, PerExample, Tokens

Made = TypeVar("Made", bound=Callable[..., Any])


def over_tokens(objective: Made) -> Made:
    """Declares an objective whose mean is one over all tokens of a batch: a piece counts as its `weights()` do."""
    objective.over_tokens = True
    return objective


def mixes(reason: str) -> Callable[[Made], Made]:
    """Declares an objective or a part that depends on the other examples of its piece, in a sentence."""

    def declare(made: Made) -> Made:
        made.mixes = reason
        return made

    return declare


def mixing(recipe: Part) -> list[str]:
    """Why a batch of the recipe is not the same whole and in pieces: the sentence of each part that `mixes`."""
    makers = [value.target for _, value in recipe.walk() if isinstance(value, Part)]
    found = [_FOREIGN if _is_foreign(make) else getattr(make, "mixes", None) for make in makers]
    return list(dict.fromkeys(reason for reason in found if reason))


_FOREIGN = "torch's batch norm standardises each piece by itself"


def _is_foreign(make: Any) -> bool:
    return isinstance(make, type) and issubclass(make, nn.modules.batchnorm._BatchNorm)


def counted(objective: Any, piece: Any) -> float:
    """What a piece of a batch counts for in the batch's mean loss: its examples, or its tokens."""
    weights = piece.weights()
    return (
        float(weights.sum()) if getattr(getattr(objective, "make", objective), "over_tokens", False) else len(weights)
    )


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
