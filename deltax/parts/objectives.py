"""What a run minimises. An objective gives one loss for each example; the loop takes the mean."""

from typing import Any

from torch import nn

from deltax.shapes import PerExample


def next_token(model: nn.Module, batch: Any) -> PerExample:
    """Mean cross-entropy of each sequence, in nats a token. Targets of -100 do not count."""
    logits = model(batch.inputs)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    counted = (batch.targets >= 0).sum(1).clamp(min=1)
    return losses.view_as(batch.targets).sum(1) / counted


def classify(model: nn.Module, batch: Any) -> PerExample:
    """Cross-entropy of each example's label in nats, of a model that gives images (B, C, Y, X) logits (B, V)."""
    return nn.functional.cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
