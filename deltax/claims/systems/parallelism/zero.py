"""Claims of zero: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import claim
from deltax.papers.systems.parallelism.zero import Training, memory, zero
from deltax.parts.distributed.ranks import Ranks


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
