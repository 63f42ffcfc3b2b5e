"""Claims of diloco: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import nn

from deltax import Part, claim
from deltax.claims.checking import loss_on_batch, small_classifier
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.local_updates.diloco import diloco, unreliable
from deltax.papers.optimization.local_updates.local_sgd import LocalSteps, local_sgd
from deltax.papers.optimization.optimizers.adamw import adamw
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.distributed.exchange import ring_bytes
from deltax.parts.distributed.replicas import flat


@claim
def meeting_every_step_without_momentum_is_data_parallelism():
    """With H = 1, SGD inside, and outside rate 1 without momentum, it is synchronous data parallelism: after every
    round, the weights of one SGD on the mean gradient of the workers.
    """
    apart, together = small_classifier(), small_classifier()
    ours = _optimizer(apart, sgd(lr=0.2, momentum=0.0), every=1, outer_lr=1.0, outer_momentum=0.0)
    theirs = torch.optim.SGD(together.parameters(), lr=0.2)
    for round in range(10):
        theirs.zero_grad()
        for worker in range(3):
            _step(apart, ours, 3 * round + worker)
            (loss_on_batch(together, 3 * round + worker) / 3).backward()
        theirs.step()
        for p, q in zip(ours.shared, together.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert (apart[0].weight - small_classifier()[0].weight).abs().max() > 0.02


@claim
def one_worker_without_momentum_is_lookahead():
    """One worker with outer rate a and no outer momentum is Lookahead (arXiv:1907.08610): after every H steps of AdamW
    the slow weights move by a times the way to the fast ones, which start again from there.
    """
    alone, fast = small_classifier(), small_classifier()
    ours = _optimizer(alone, adamw(lr=0.05, weight_decay=0.0), workers=1, every=4, outer_lr=0.6, outer_momentum=0.0)
    inner = torch.optim.AdamW(fast.parameters(), lr=0.05, weight_decay=0.0, fused=True)
    slow = [p.detach().clone() for p in fast.parameters()]
    for step in range(12):
        _step(alone, ours, step)
        _step(fast, inner, step)
        if step % 4 == 3:
            for p, kept in zip(fast.parameters(), slow, strict=True):
                p.data.copy_(kept.add_(p.detach() - kept, alpha=0.6))
    torch.testing.assert_close(flat(list(alone.parameters())), flat(list(fast.parameters())), rtol=1e-10, atol=1e-10)


@claim
def a_worker_that_misses_a_round_goes_on_alone():
    """The others' round is as if it were not there: they meet at their own mean; it goes on from its own weights, and
    the next round finds its pseudo-gradient against what is shared by then.
    """
    model = small_classifier()
    ours = _optimizer(model, sgd(lr=0.1, momentum=0.0), every=2, outer_lr=1.0, outer_momentum=0.0)
    missing = lambda round, worker: (round, worker) != (1, 2)
    ours.attendance = missing
    for turn in range(5):
        _step(model, ours, turn)
    ends = [flat(ours.local[w]).clone() for w in (0, 1)]
    _step(model, ours, 5)
    lonely = flat(ours.local[2]).clone()
    torch.testing.assert_close(flat(ours.shared).detach(), torch.stack(ends).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(flat(ours.local[0]), flat(ours.shared)) and not torch.equal(lonely, flat(ours.shared))
    for turn in range(6, 12):
        _step(model, ours, turn)
    assert all(torch.equal(flat(local), flat(ours.shared)) for local in ours.local)


@claim
def bytes_a_step_fall_as_one_over_h():
    """What each worker sends is 2 (P - 1) / P of the model a round, chunks rounded up: H = 5 sends a fifth of H = 1."""
    counted = {}
    for every in (1, 5):
        model = small_classifier()
        ours = _optimizer(model, adamw(), every=every)
        for turn in range(30):
            _step(model, ours, turn)
        counted[every] = ours.exchange.sent
    numbers = sum(p.numel() for p in small_classifier().parameters())
    assert counted == {1: 10 * ring_bytes(numbers, 3, width=8), 5: 2 * ring_bytes(numbers, 3, width=8)}


@claim.measured(paper="8 workers on C4 match synchronous training with 8 times the batch, communicating 500 times less")
def as_good_as_synchronous(lab):
    """Of gpt, 4 workers that meet after every 20 of their 200 steps end at most 0.05 bits per byte above synchronous
    training on as much data in batches 4 times as large, with a twentieth of its communication.
    """
    apart, together = _sizes(lab)
    ends = lambda recipe, steps: [lab.train(recipe, seed=s, steps=steps).score for s in lab.seeds(3)]
    sync, ours = ends(together, 200), ends(apart + diloco, 800)
    gaps = [a - b for a, b in zip(ours, sync, strict=True)]
    return lab.at_most(gaps, 0.05, unit="bits per byte", numbers={"synchronous": sync, "diloco": ours})


@claim.measured(paper="better than averaging the weights (FedAvg, outer SGD) at equal communication (Figure 6)")
def better_than_averaging(lab):
    """Of gpt, 4 workers that meet after every 20 of their 200 steps end at least 0.02 bits per byte below the average
    that local SGD takes, with the same AdamW inside.
    """
    apart, _ = _sizes(lab)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    averaged, ours = ends(apart + local_sgd), ends(apart + diloco)
    gaps = [a - b for a, b in zip(averaged, ours, strict=True)]
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers={"averaged": averaged, "diloco": ours})


@claim.measured(paper="messages dropped with chance up to 50 % cost little (section 3.2, Figure 8)")
def dropped_messages_cost_little(lab):
    """When each worker misses each meeting with chance 0.3, DiLoCo ends at most 0.05 bits per byte higher."""
    apart, _ = _sizes(lab)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    whole, dropped = ends(apart + diloco), ends((apart + diloco).fill("attendance", unreliable))
    gaps = [a - b for a, b in zip(dropped, whole, strict=True)]
    return lab.at_most(gaps, 0.05, unit="bits per byte", numbers={"all present": whole, "0.3 missing": dropped})


def _sizes(lab) -> tuple[Part, Part]:
    """A small gpt for workers that read 8 sequences a step, and for synchronous steps of all 4 together."""
    small = lab.recipe("gpt(dim=48, depth=2)")
    return small.put("loop.batch", 8), small.put("loop.batch", 32)


def _optimizer(model: nn.Module, inner: Any, *, workers: int = 3, **options: Any) -> LocalSteps:
    return (gpt + inner + diloco(workers=workers, **options))["optimizer"](model)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> None:
    optimizer.zero_grad()
    loss_on_batch(model, batch).backward()
    optimizer.step()
