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

from deltax import claim, paper
from deltax.papers.optimization.adamw import adamw
from deltax.parts.ranks import Ranks

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


@claim
def every_stage_ends_with_the_same_weights():
    """At every stage, on 2 to 4 ranks, AdamW comes to the weights that one process with all the data comes to."""
    for ranks in (2, 3, 4):
        alone = zero(_start(), 1, _adamw, stage=0, low=torch.float64)
        for _ in range(6):
            alone.step(lambda _, w, n=ranks: torch.stack([_gradient(rank, w) for rank in range(n)]).mean(0))
        for stage in range(4):
            spread = zero(_start(), ranks, _adamw, stage=stage, low=torch.float64)
            for _ in range(6):
                spread.step(_gradient)
            torch.testing.assert_close(spread.model(), alone.model(), rtol=1e-10, atol=1e-12)
        assert (alone.model() - _start()).abs().min() > 1e-3


@claim
def memory_falls_to_the_closed_form():
    """Between steps every rank holds, to the byte, (2 + 2 + 12) N, then 4 N + 12 N / P, 2 N + 14 N / P, 16 N / P."""
    for ranks in (2, 4, 8):
        for stage in range(4):
            spread = zero(torch.randn(4096), ranks, _adamw, stage=stage)
            spread.step(lambda _, w: w)
            assert spread.bytes() == [memory(4096, ranks, stage=stage)] * ranks


@claim
def a_model_of_seven_billion():
    """With 7.5 billion parameters each of 64 ranks holds 120 GB, and 31.4, 16.6 and 1.9 at the stages (Figure 1)."""
    gigabytes = [memory(7.5e9, 64, stage=stage) / 1e9 for stage in range(4)]
    assert [round(g, 1) for g in gigabytes] == [120.0, 31.4, 16.6, 1.9]


@claim
def only_the_last_stage_sends_more():
    """Stages 1 and 2 send what data parallelism sends, 2 (P - 1) / P of the weights; stage 3 sends half as much again
    (section 7)."""
    for ranks in (2, 4):
        for stage, passes in enumerate((2, 2, 2, 3)):
            spread = zero(torch.randn(240), ranks, _adamw, stage=stage)
            spread.step(lambda _, w: w)
            assert spread.ring.sent == [passes * (ranks - 1) * 240 // ranks] * ranks


@claim
def a_norm_needs_one_number_a_rank():
    """The norm of the whole gradient is the root of the summed squares of the shards: clipping needs nothing more."""
    torch.manual_seed(0)
    ring, gradients = Ranks(3), torch.randn(3, 31, dtype=torch.float64)
    squares = [shard.square().sum()[None] for shard in ring.reduce_scatter(list(gradients))]
    torch.testing.assert_close(ring.all_reduce(squares)[1].sqrt()[0], gradients.sum(0).norm())


@claim.parity(peer="torch.distributed.optim.ZeroRedundancyOptimizer")
def memory_is_divided_as_torch_divides_it():
    """A rank's optimizer state is the P-th part of the whole, up to one parameter, as torch's partition has it."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.optim import ZeroRedundancyOptimizer

    init_process_group("fake", rank=0, world_size=4, store=HashStore())
    try:
        parameters = [torch.nn.Parameter(torch.randn(n)) for n in (12, 12, 12, 12)]
        theirs = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW)
        each = [sum(p.numel() for g in groups for p in g["params"]) for groups in theirs._partition_parameters()]
    finally:
        destroy_process_group()
    ours = zero(torch.randn(48), 4, _adamw, stage=1)
    assert [Training._master(o).numel() for o in ours.optimizers] == each


def _adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)


def _start() -> Tensor:
    return torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _gradient(rank: int, weights: Tensor) -> Tensor:
    """Of a least-squares fit to the rank's own data."""
    draws = torch.Generator().manual_seed(rank + 1)
    x, y = (torch.randn(*shape, dtype=torch.float64, generator=draws) for shape in ((5, 17), (5,)))
    return x.T @ (x @ weights - y) / 5
