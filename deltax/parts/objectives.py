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
