"""Claims of fsdp: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.claims.systems.parallelism.gpipe import layers
from deltax.papers.systems.parallelism.fsdp import fsdp, hybrid
from deltax.papers.systems.parallelism.zero import zero
from deltax.parts.distributed.ranks import unflat


@claim
def the_gradient_is_that_of_the_batch():
    """On 1 to 4 ranks, the gathered gradient shards equal the gradient of one process with all the data, to 1e-10."""
    for ranks in (1, 2, 3, 4):
        units, x, y = layers(5)
        whole = torch.autograd.grad(nn.functional.mse_loss(nn.Sequential(*units)(x), y), list(units.parameters()))
        found = fsdp(units, ranks).gradients(x.chunk(ranks), _losses(y, ranks))
        ours = [unflat(torch.cat(shards), list(unit.parameters())) for shards, unit in zip(found, units)]
        torch.testing.assert_close([g for unit in ours for g in unit], list(whole), rtol=1e-10, atol=1e-12)


@claim
def a_rank_holds_its_shards_and_two_units():
    """On 2 and 4 ranks, the most a rank holds is its shards plus the two largest neighbouring units (section 4)."""
    for sizes in ((5, 5, 5, 5), (3, 9, 2, 7, 8)):
        units = nn.ModuleList(nn.Sequential(nn.Linear(3, n), nn.Linear(n, 3)) for n in sizes).double()
        counts = [sum(p.numel() for p in unit.parameters()) for unit in units]
        for ranks in (2, 4):
            spread = fsdp(units, ranks)
            x, y = torch.randn(2, 8, 3, dtype=torch.float64)
            spread.gradients(x.chunk(ranks), _losses(y, ranks))
            padded = [n + -n % ranks for n in counts]
            assert spread.most == sum(padded) // ranks + max(map(sum, pairwise(padded)))
            assert spread.held == sum(padded) // ranks


@claim
def it_sends_what_the_third_stage_sends():
    """On 2 and 3 ranks, each rank sends 3 (P - 1) / P of the weights a step, as at ZeRO's stage 3."""
    units, x, y = layers(4)
    for ranks in (2, 3):
        spread = fsdp(units, ranks)
        spread.gradients(x.chunk(ranks), _losses(y, ranks))
        weights = torch.cat([torch.cat(shards) for shards in spread.shards])
        third = zero(weights, ranks, torch.optim.AdamW, stage=3, low=torch.float64)
        third.step(lambda _, w: w)
        assert spread.ring.sent == third.ring.sent == [3 * (ranks - 1) * weights.numel() // ranks] * ranks


@claim
def groups_that_shard_spare_the_slow_wire():
    """On 8 ranks in groups of 1, 2 and 4, hybrid shards equal the mean gradient's to 1e-12, with 2 (R - 1) / (R F) of
    it sent between groups.
    """
    torch.manual_seed(0)
    gradients = list(torch.randn(8, 48, dtype=torch.float64))
    mean = torch.stack(gradients).mean(0)
    for group in (1, 2, 4):
        shards, sent = hybrid(gradients, group)
        for first in range(0, 8, group):
            torch.testing.assert_close(torch.cat(shards[first : first + group]), mean, rtol=1e-12, atol=1e-12)
        replicas = 8 // group
        assert sent == 2 * (replicas - 1) * 48 // (replicas * group)


def _losses(y: Tensor, ranks: int) -> list[Callable[[Tensor], Tensor]]:
    return [lambda out, target=target: nn.functional.mse_loss(out, target) for target in y.chunk(ranks)]
