"""Claims of zero: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import claim
from deltax.papers.systems.parallelism.zero import Training, memory, zero
from deltax.parts.distributed.ranks import Ranks


@claim
def every_stage_ends_with_the_same_weights():
    """At stages 0 to 3 on 2 to 4 ranks, 6 steps of AdamW give the weights of one process with all the data, to
    1e-10.
    """
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
    """On 2, 4 and 8 ranks, bytes a rank equal 16 N, 4 N + 12 N / P, 2 N + 14 N / P and 16 N / P at stages 0 to 3."""
    for ranks in (2, 4, 8):
        for stage in range(4):
            spread = zero(torch.randn(4096), ranks, _adamw, stage=stage)
            spread.step(lambda _, w: w)
            assert spread.bytes() == [memory(4096, ranks, stage=stage)] * ranks


@claim
def a_model_of_seven_billion():
    """With 7.5 billion parameters on 64 ranks, a rank holds 120, 31.4, 16.6 and 1.9 GB at stages 0 to 3 (Figure 1)."""
    gigabytes = [memory(7.5e9, 64, stage=stage) / 1e9 for stage in range(4)]
    assert [round(g, 1) for g in gigabytes] == [120.0, 31.4, 16.6, 1.9]


@claim
def only_the_last_stage_sends_more():
    """Stages 0 to 2 send 2 (P - 1) / P of the weights a step, stage 3 sends 3 (P - 1) / P (section 7)."""
    for ranks in (2, 4):
        for stage, passes in enumerate((2, 2, 2, 3)):
            spread = zero(torch.randn(240), ranks, _adamw, stage=stage)
            spread.step(lambda _, w: w)
            assert spread.ring.sent == [passes * (ranks - 1) * 240 // ranks] * ranks


@claim
def a_norm_needs_one_number_a_rank():
    """On 3 ranks, the gradient norm equals the root of the all-reduced squared norms of the shards."""
    torch.manual_seed(0)
    ring, gradients = Ranks(3), torch.randn(3, 31, dtype=torch.float64)
    squares = [shard.square().sum()[None] for shard in ring.reduce_scatter(list(gradients))]
    torch.testing.assert_close(ring.all_reduce(squares)[1].sqrt()[0], gradients.sum(0).norm())


@claim.parity(peer="torch.distributed.optim.ZeroRedundancyOptimizer")
def memory_is_divided_as_torch_divides_it():
    """On 4 ranks, each optimizer shard has as many elements as in torch's ZeroRedundancyOptimizer."""
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
    """The gradient of a least-squares fit to the rank's own data."""
    draws = torch.Generator().manual_seed(rank + 1)
    x, y = (torch.randn(*shape, dtype=torch.float64, generator=draws) for shape in ((5, 17), (5,)))
    return x.T @ (x @ weights - y) / 5
