"""Claims of async-local-sgd: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import Part, claim, part
from deltax.claims.checking import loss_on_batch, small_classifier
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.local_updates.async_local_sgd import DelayedNesterov, alike, async_local_sgd
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.papers.optimization.local_updates.nesterov_outer import outer_nesterov
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.distributed.replicas import flat


@claim
def n_pushes_are_one_step_of_nesterovs_momentum():
    """After each N pushes the weights are those of torch's SGD with Nesterov's momentum along the mean of the N."""
    torch.manual_seed(0)
    start = torch.randn(7, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    delayed = DelayedNesterov([ours], lr=0.7, momentum=0.9, buffer=3)
    nesterov = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(6):
        pushes = torch.randn(3, 7, dtype=torch.float64)
        for push in pushes:
            ours.grad = push
            delayed.step()
        theirs.grad = pushes.mean(0)
        nesterov.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@claim
def at_every_push_momentum_overcounts():
    """Of 4 pushes that say the same, Nesterov's momentum at each goes more than 4 times as far as along their mean."""
    weights = {}
    for name, outer in (("each", outer_nesterov), ("delayed", DelayedNesterov)):
        weights[name] = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = outer([weights[name]])
        for _ in range(4):
            weights[name].grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
    assert weights["each"] / weights["delayed"] > 4


@claim
def one_worker_has_nobody_to_wait_for():
    """With one worker and N = 1 it is DiLoCo with one worker, to rounding."""
    ours, theirs = small_classifier(), small_classifier()
    a = (gpt + sgd(lr=0.1) + async_local_sgd(speeds=(3.0,), every=4))["optimizer"](ours)
    b = (gpt + sgd(lr=0.1) + diloco(workers=1, every=4))["optimizer"](theirs)
    for step in range(12):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss_on_batch(model, step).backward()
            optimizer.step()
    torch.testing.assert_close(flat(a.shared), flat(b.shared), rtol=1e-10, atol=1e-10)


@claim
def steps_are_taken_in_the_order_of_their_ends():
    """Workers of speeds 1, 1, 2, 4 take steps in these proportions, no time goes backwards, and with dynamic local
    updates all come back after the same time, where with equal steps the slow ones come back four times as late.
    """
    model = small_classifier()
    optimizer = (gpt + sgd(lr=0.0) + async_local_sgd(every=8))["optimizer"](model)
    before = 0.0
    for _ in range(80):
        loss_on_batch(model, 0).backward()
        optimizer.step()
        assert optimizer.time >= before
        before = optimizer.time
    assert optimizer.taken == [10, 10, 20, 40] and optimizer.own == [2, 2, 4, 8]
    assert {own / speed for own, speed in zip(optimizer.own, optimizer.speeds, strict=True)} == {2.0}
    assert [alike(speed, 4, 8) / speed for speed in (1, 4)] == [8.0, 2.0]


@claim.measured(paper="naive momentum converges slower than synchronous DiLoCo (Figure 3)")
def naive_momentum_is_worse(lab):
    """At equal data, workers of speeds 1, 1, 2 and 4 with Nesterov's momentum at every push end at least 0.02 bits per
    byte above synchronous DiLoCo.
    """
    small = _small(lab)
    naive = small + async_local_sgd
    naive = naive.fill("outer", part(outer_nesterov)).fill("pace", alike)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    sync, theirs, ours = ends(small + diloco), ends(naive), ends(small + async_local_sgd)
    gaps = [a - b for a, b in zip(theirs, sync, strict=True)]
    numbers = {"synchronous": sync, "naive": theirs, "delayed, dynamic": ours}
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers=numbers)


@claim.measured(paper="matches synchronous Local-SGD per update and surpasses it in wall-clock time (abstract)")
def better_in_the_same_time(lab):
    """While synchronous DiLoCo, at the pace of the slowest of speeds 1, 1, 2 and 4, takes 400 steps, nobody waiting
    takes 800, and ends at least 0.02 bits per byte lower.
    """
    small = _small(lab)
    sync = [lab.train(small + diloco, seed=s, steps=400).score for s in lab.seeds(3)]
    ours = [lab.train(small + async_local_sgd, seed=s, steps=800).score for s in lab.seeds(3)]
    gaps = [a - b for a, b in zip(sync, ours, strict=True)]
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers={"synchronous": sync, "asynchronous": ours})


def _small(lab) -> Part:
    return lab.recipe("gpt(dim=48, depth=2)").put("loop.batch", 8)
