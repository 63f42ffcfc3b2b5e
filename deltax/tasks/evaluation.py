"""How good a model is on held-out data, example by example, so that two can be compared on paired differences."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """A score and what it is the mean of.

    score    the weighted mean of `values`, in the task's unit
    values   (N,) one for each held-out example
    weights  (N,) what each counts for
    clusters (N,) the document or scene each comes from
    metrics  further figures by name, for reports
    """

    score: float
    values: np.ndarray
    weights: np.ndarray
    clusters: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def held_out(
    task: Any, model: nn.Module, objective: Callable[..., Any], *, size: int = 64, split: str = "validation"
) -> Evaluation:
    """The objective on the task's held-out batches, in the task's unit; its random draws are the same each time."""
    device = next(model.parameters()).device
    values, weights = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in task.held_out_batches(size, split):
            batch = batch.to(device)
            values.append(objective(model, batch).float().cpu())
            weights.append(batch.weights().cpu())
    each, weight = torch.cat(values).double().numpy(), torch.cat(weights).double().numpy()
    clusters = np.asarray(task.held_out_documents(split))
    score = task.score(float(np.average(each, weights=weight)))
    return Evaluation(score, np.array([task.score(v) for v in each]), weight, clusters)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of samples (N, ...) and (M, ...), unbiased: 0 on average where both are of
    one distribution, and so at times below (Szekely and Rizzo, 2013)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = lambda x: torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()
