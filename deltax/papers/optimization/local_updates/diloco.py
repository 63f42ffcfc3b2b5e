"""DiLoCo: Distributed Low-Communication Training of Language Models.
Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen, 2023. arXiv:2311.08105

Local SGD with Nesterov's momentum on the outside, but hundreds of AdamW steps on the inside: islands of machines that
meet so rarely that a slow line between them will do.

Each island keeps AdamW's state to itself and sends only what its weights moved. In the paper 8 workers that meet after
every 500 steps match synchronous training with 8 times the batch on C4, and a worker that misses rounds, one that
leaves and one that comes late all do little harm. The inner optimizer is the recipe's own, AdamW in `gpt`, with its
schedule over all of the run's steps. The paper starts from a model trained synchronously for a while; here from fresh.
"""

import torch

from deltax import Part, paper
from deltax.papers.optimization.local_updates.local_sgd import local_sgd
from deltax.papers.optimization.local_updates.nesterov_outer import nesterov_outer
from deltax.papers.optimization.optimizers.adamw import adamw


def unreliable(round: int, worker: int, *, share: float = 0.3, seed: int = 0) -> bool:
    """Each worker misses each round with chance `share`, drawn anew (the paper's dropped communication)."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + round) * 1009 + worker)
    return bool(torch.rand((), generator=draw) >= share)


@paper(on=(local_sgd, nesterov_outer, adamw), arxiv="2311.08105", year=2023)
def diloco(
    recipe: Part, *, workers: int = 4, every: int = 20, outer_lr: float = 0.7, outer_momentum: float = 0.9
) -> Part:
    recipe = local_sgd(recipe, workers=workers, every=every)
    return nesterov_outer(recipe, lr=outer_lr, momentum=outer_momentum)
