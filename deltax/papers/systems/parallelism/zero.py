"""ZeRO: Memory Optimizations Toward Training Trillion Parameter Models.
Rajbhandari, Rasley, Ruwase, He, 2019. arXiv:1910.02054

Data parallelism, but no rank keeps what another has: optimizer state, then gradients, then parameters are sharded.

Replicas waste memory, not wire. A sum around a ring is a scatter and then a gather; between the two each rank holds
one shard of the gradient, and that is where the optimizer can step. Stages 1 and 2 therefore send what data
parallelism sends. Stage 3 gathers the parameters twice more and throws them away again, for half as much wire again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.optimization.optimizers.adamw import adamw
from deltax.parts.distributed.ranks import Ranks

Gradient = Callable[[int, Tensor], Tensor]  # rank, all weights -> that rank's gradient of all weights
State = Callable[[list[Tensor]], torch.optim.Optimizer]


class Training:
    """The training state of one model, spread over a ring of ranks at a stage from 0, all of it on each, to 3.

    weights (N,) are kept and sent in `low` precision; each rank steps a master copy in the precision they come in.
    Every rank ends a step with the sum of its peers' gradients divided by their number, as in data parallelism.
    """

    def __init__(self, weights: Tensor, ring: Ranks, optimizer: State, *, stage: int, low: torch.dtype):
        self.ring, self.stage, self.count, self.low = ring, stage, weights.numel(), low
        padded = torch.nn.functional.pad(weights, (0, -self.count % ring.size))
        self.shards = [shard.clone() for shard in padded.chunk(ring.size)]
        masters = self.shards if stage else [padded.clone() for _ in range(ring.size)]
        self.optimizers = [optimizer([master.clone()]) for master in masters]
        self.weights = [(s if stage == 3 else padded).to(low) for s in self.shards]
        self.gradients: list[Tensor] = []

    def step(self, gradient: Gradient) -> None:
        """One step on all ranks. Stage 3 gathers the weights for the forward pass and again for the backward pass."""
        if self.stage == 3:
            for _ in ("forward", "backward"):
                everywhere = self.ring.all_gather(self.weights)
        else:
            everywhere = self.weights
        whole = [gradient(rank, w[: self.count]).to(self.low) for rank, w in enumerate(everywhere)]
        if self.stage == 0:
            summed = [self._padded(total) for total in self.ring.all_reduce(whole)]
        else:
            summed = self.ring.reduce_scatter(whole)
        self.gradients = [self._padded(g) for g in whole] if self.stage == 1 else summed
        for optimizer, total in zip(self.optimizers, summed):
            master = self._master(optimizer)
            master.grad = (total / self.ring.size).to(master.dtype)
            optimizer.step()
            master.grad = None
        masters = [self._master(optimizer).to(self.low) for optimizer in self.optimizers]
        self.weights = self.ring.all_gather(masters) if self.stage in (1, 2) else masters

    def model(self) -> Tensor:
        """All weights (N,) in the masters' precision."""
        masters = [self._master(optimizer) for optimizer in self.optimizers]
        return (torch.cat(masters) if self.stage else masters[0])[: self.count].detach()

    def bytes(self) -> list[int]:
        """What each rank holds between steps: weights, gradients, masters and the optimizer's moments."""
        moments = [[t for s in o.state.values() for t in s.values() if t.ndim] for o in self.optimizers]
        kept = zip(self.weights, self.gradients, map(self._master, self.optimizers), moments)
        return [sum(t.numel() * t.element_size() for t in (w, g, m, *rest)) for w, g, m, rest in kept]

    def _padded(self, gradient: Tensor) -> Tensor:
        return torch.nn.functional.pad(gradient, (0, -self.count % self.ring.size))

    @staticmethod
    def _master(optimizer: Any) -> Tensor:
        return optimizer.param_groups[0]["params"][0]


@paper(on=adamw, year=2019, arxiv="1910.02054")
def zero(
    weights: Tensor, ranks: int, optimizer: State, *, stage: int = 3, low: torch.dtype = torch.float16
) -> Training:
    """Training of these weights (N,): stage 1 shards the optimizer, 2 the gradient too, 3 the weights too."""
    return Training(weights, Ranks(ranks), optimizer, stage=stage, low=low)


def memory(parameters: float, ranks: int, *, stage: int, optimizer: int = 12) -> float:
    """Bytes a rank holds (section 5): 2 a weight, 2 a gradient, and `optimizer` for the master copy and two moments."""
    shares = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return parameters * sum(bytes / share for bytes, share in zip((2, 2, optimizer), shares))
