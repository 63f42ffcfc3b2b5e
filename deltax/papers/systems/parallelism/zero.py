"""ZeRO: Memory Optimizations Toward Training Trillion Parameter Models.
Rajbhandari, Rasley, Ruwase, He, 2019. arXiv:1910.02054

AdamW on data-parallel ranks, but optimizer state, then gradients, then parameters are sharded instead of replicated.

An all-reduce is a reduce-scatter and an all-gather. Between the two, each rank holds one shard of the gradient, and
there it steps its shard of the optimizer. So stages 1 and 2 send as much as data parallelism. Stage 3 gathers the
parameters in forward and in backward and frees them after use, which sends half as much again.
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
    """The training state of one model over a ring of ranks, at stage 0 (replicated) to 3 (all sharded).

    weights (N,) are stored and sent in dtype `low`; each rank steps a master copy in the weights' own dtype. Every
    rank's gradient is averaged, as in data parallelism.
    """

    def __init__(self, weights: Tensor, ring: Ranks, optimizer: State, *, stage: int, low: torch.dtype):
        self.ring, self.stage, self.count, self.low = ring, stage, weights.numel(), low
        # padded to a multiple of the ring's size
        padded = torch.nn.functional.pad(weights, (0, -self.count % ring.size))
        self.shards = [shard.clone() for shard in padded.chunk(ring.size)]
        masters = self.shards if stage else [padded.clone() for _ in range(ring.size)]
        self.optimizers = [optimizer([master.clone()]) for master in masters]
        self.weights = [(s if stage == 3 else padded).to(low) for s in self.shards]
        self.gradients: list[Tensor] = []

    def step(self, gradient: Gradient) -> None:
        """One step on all ranks. Stage 3 gathers the weights for forward and again for backward."""
        if self.stage == 3:
            for _ in ("forward", "backward"):
                everywhere = self.ring.all_gather(self.weights)
        else:
            everywhere = self.weights
        whole = [gradient(rank, w[: self.count]).to(self.low) for rank, w in enumerate(everywhere)]
        # stage 0: all-reduce, 2N sent; else reduce-scatter here and all-gather of weights below
        if self.stage == 0:
            summed = [self._padded(total) for total in self.ring.all_reduce(whole)]
        else:
            summed = self.ring.reduce_scatter(whole)
        self.gradients = [self._padded(g) for g in whole] if self.stage == 1 else summed
        for optimizer, total in zip(self.optimizers, summed):
            master = self._master(optimizer)
            # mean gradient, in the precision of the master copy
            master.grad = (total / self.ring.size).to(master.dtype)
            optimizer.step()
            master.grad = None
        # stages 1 and 2 gather the new weights; stage 3 keeps its shard
        masters = [self._master(optimizer).to(self.low) for optimizer in self.optimizers]
        self.weights = self.ring.all_gather(masters) if self.stage in (1, 2) else masters

    def model(self) -> Tensor:
        """All weights (N,) in the masters' dtype."""
        masters = [self._master(optimizer) for optimizer in self.optimizers]
        return (torch.cat(masters) if self.stage else masters[0])[: self.count].detach()

    def bytes(self) -> list[int]:
        """Bytes of each rank between steps: weights, gradients, masters and moments."""
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
    """Training of weights (N,): stage 1 shards the optimizer, 2 also the gradient, 3 also the weights."""
    return Training(weights, Ranks(ranks), optimizer, stage=stage, low=low)


def memory(parameters: float, ranks: int, *, stage: int, optimizer: int = 12) -> float:
    """Bytes a rank holds (section 5): 2 a weight, 2 a gradient, `optimizer` for master copy and moments."""
    shares = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return parameters * sum(bytes / share for bytes, share in zip((2, 2, optimizer), shares))
