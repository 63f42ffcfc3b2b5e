"""Asynchronous Local-SGD Training for Language Modeling.
Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato, 2024. arXiv:2401.09135

DiLoCo, but nobody waits: each worker's pseudo-gradient is applied as soon as it is done, and the momentum takes its
part only once every N pushes.

Pushes that set out from the same weights say the same thing, so momentum at each of them counts it several times over.
Delayed Nesterov adds each push as it comes, an N-th of it, and lets the momentum see the mean of N (Algorithm 3).
Dynamic local updates let a slow worker take fewer steps, in proportion to its speed, so that none comes back stale.

In a recipe the workers' clocks are simulated: the next step of the loop is that of the worker who would be done first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.papers.language.gpt import gpt
from deltax.papers.optimization.diloco import diloco
from deltax.papers.optimization.nesterov_outer import outer_nesterov
from deltax.papers.optimization.sgd import sgd
from deltax.parts.checking import loss_on_batch, small_classifier
from deltax.parts.replicas import Replicas, assign, flat


def alike(speed: float, fastest: float, every: int) -> int:
    """Every worker takes the same number of steps between pushes."""
    return every


def by_speed(speed: float, fastest: float, every: int) -> int:
    """Dynamic local updates: the fastest takes `every` steps between pushes, the others in proportion (Eq. 6)."""
    return max(1, int(speed / fastest * every + 1e-9))


class Asynchronous(Replicas):
    """Workers of different speeds that push when they are done, and go on from what is shared by then.

    speeds  steps a worker takes in a unit of time
    every   steps between pushes, as `pace` takes it
    outer   outer(weights) -> optimizer of what is shared, stepped at every push
    pace    pace(speed, fastest, every) -> a worker's own number of steps

    Raises UserError for no workers, a speed that is not above 0, or `every` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner: Part,
        outer: Part,
        speeds: tuple[float, ...] = (1, 1, 2, 4),
        every: int = 20,
        pace: Part = part(alike),
    ):
        if every < 1 or not all(speed > 0 for speed in speeds):
            raise UserError(f"speeds are above 0 and pushes after at least 1 step, not {speeds} and {every}")
        super().__init__(model, inner=inner, workers=len(speeds))
        self.speeds = speeds
        self.own = [pace(speed, max(speeds), every) for speed in speeds]
        self.outer = outer(self.shared)
        self.starts = [flat(self.shared).detach().clone() for _ in speeds]

    @property
    def time(self) -> float:
        """When the last step was done, in the unit of the speeds."""
        return max(taken / speed for taken, speed in zip(self.taken, self.speeds, strict=True))

    def next_worker(self) -> int:
        done = [(taken + 1) / speed for taken, speed in zip(self.taken, self.speeds, strict=True)]
        return done.index(min(done))

    def stepped(self, worker: int) -> None:
        if self.taken[worker] % self.own[worker] == 0:
            self.descend(self.outer, self.starts[worker] - flat(self.local[worker]))
            assign(self.local[worker], self.shared)
            self.starts[worker].copy_(flat(self.shared))

    def agree(self) -> None:
        """What was not pushed by the end is lost."""

    def memory(self) -> tuple[dict[str, Tensor], list[tuple[str, torch.optim.Optimizer]]]:
        return {f"start{w}": start for w, start in enumerate(self.starts)}, [("outer", self.outer)]


class DelayedNesterov(torch.optim.Optimizer):
    """w <- w - rate g / N at each step; at each N-th also m <- momentum m + (mean of the N), w <- w - rate momentum m.

    Algorithm 3 with c = 0. After N steps the weights have moved as by one of Nesterov's steps along the mean.
    """

    def __init__(self, weights: Sequence[Tensor], *, rate: float = 0.7, momentum: float = 0.9, buffer: int = 4):
        super().__init__(weights, {"lr": rate, "momentum": momentum, "buffer": buffer})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            rate, momentum, buffer = group["lr"], group["momentum"], group["buffer"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(pushes=torch.zeros(()), waiting=torch.zeros_like(p), momentum=torch.zeros_like(p))
                state["pushes"] += 1
                state["waiting"].add_(p.grad, alpha=1 / buffer)
                p.add_(p.grad, alpha=-rate / buffer)
                if state["pushes"] % buffer == 0:
                    state["momentum"].mul_(momentum).add_(state["waiting"])
                    p.add_(state["momentum"], alpha=-rate * momentum)
                    state["waiting"].zero_()


@paper(on=diloco, arxiv="2401.09135", year=2024)
def async_local_sgd(
    recipe: Part,
    *,
    speeds: Sequence[float] = (1, 1, 2, 4),
    every: int = 20,
    outer_rate: float = 0.7,
    outer_momentum: float = 0.9,
) -> Part:
    outer = part(DelayedNesterov, rate=outer_rate, momentum=outer_momentum, buffer=len(speeds))
    return recipe.wrap("optimizer", Asynchronous, outer=outer, speeds=tuple(speeds), every=every, pace=part(by_speed))


@claim
def n_pushes_are_one_step_of_nesterovs_momentum():
    """After each N pushes the weights are those of torch's SGD with Nesterov's momentum along the mean of the N."""
    torch.manual_seed(0)
    start = torch.randn(7, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    delayed = DelayedNesterov([ours], rate=0.7, momentum=0.9, buffer=3)
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
    a = (gpt + sgd(rate=0.1) + async_local_sgd(speeds=(3.0,), every=4))["optimizer"](ours)
    b = (gpt + sgd(rate=0.1) + diloco(workers=1, every=4))["optimizer"](theirs)
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
    optimizer = (gpt + sgd(rate=0.0) + async_local_sgd(every=8))["optimizer"](model)
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
