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

from deltax import Part, UserError, paper, part
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.parts.distributed.replicas import Replicas, assign, flat


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
    """w <- w - lr g / N at each step; at each N-th also m <- momentum m + (mean of the N), w <- w - lr momentum m.

    Algorithm 3 with c = 0. After N steps the weights have moved as by one of Nesterov's steps along the mean.
    """

    def __init__(self, weights: Sequence[Tensor], *, lr: float = 0.7, momentum: float = 0.9, buffer: int = 4):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "buffer": buffer})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            lr, momentum, buffer = group["lr"], group["momentum"], group["buffer"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(pushes=torch.zeros(()), waiting=torch.zeros_like(p), momentum=torch.zeros_like(p))
                state["pushes"] += 1
                state["waiting"].add_(p.grad, alpha=1 / buffer)
                p.add_(p.grad, alpha=-lr / buffer)
                if state["pushes"] % buffer == 0:
                    state["momentum"].mul_(momentum).add_(state["waiting"])
                    p.add_(state["momentum"], alpha=-lr * momentum)
                    state["waiting"].zero_()


@paper(on=diloco, arxiv="2401.09135", year=2024)
def async_local_sgd(
    recipe: Part,
    *,
    speeds: Sequence[float] = (1, 1, 2, 4),
    every: int = 20,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
) -> Part:
    outer = part(DelayedNesterov, lr=outer_lr, momentum=outer_momentum, buffer=len(speeds))
    return recipe.wrap("optimizer", Asynchronous, outer=outer, speeds=tuple(speeds), every=every, pace=part(by_speed))
