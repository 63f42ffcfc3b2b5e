"""The loss of a language model, for training on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.kernels.twins import twin
from deltax.parts.attention.scratch import is_plain_training
from deltax.parts.training.objectives import per_sequence
from deltax.shapes import PerExample

IGNORED = -100  # the target that torch's cross_entropy does not count


@twin("parts.objectives:next_token", on="cpu", why="probabilities are saved, so that the backward pass is one product")
@needs("inputs", "targets", model=TOKENS_TO_LOGITS)
def saved_probabilities(model: nn.Module, batch: Any) -> PerExample:
    """`next_token`, which keeps the chance of every token, so that the way back is one product."""
    return per_sequence(model(batch.inputs), batch.targets, losses=_losses)


def _losses(logits: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
    if is_plain_training(logits):
        return _ChancesKept.apply(logits, targets)
    return cross_entropy(logits, targets, reduction=reduction)


class _ChancesKept(torch.autograd.Function):
    """Logits (N, V) and targets (N,) to losses (N,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ignored = targets == IGNORED
        at = targets.masked_fill(ignored, 0)[:, None]
        chances = torch.softmax(logits, -1)
        # log of the sum of exp(logits); the largest chance, unlike the target's, is never rounded to 0.
        scale = logits.amax(-1) - chances.amax(-1).log()
        ctx.save_for_backward(chances, at, ignored)
        return (scale - logits.gather(1, at)[:, 0]).masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        chances, at, ignored = ctx.saved_tensors
        gradient = gradient.masked_fill(ignored, 0)[:, None]
        return (chances * gradient).scatter_add_(1, at, -gradient), None
