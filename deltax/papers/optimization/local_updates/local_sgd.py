"""Communication-Efficient Learning of Deep Networks from Decentralized Data.
McMahan, Moore, Ramage, Hampson, Aguera y Arcas, 2016. arXiv:1602.05629

Synchronous data-parallel SGD, but the workers take H steps each between two averages of their weights.

What a round sends is as much as a step of data parallelism sends, so communication falls H-fold. While the workers are
apart they follow their own data; for convex losses local SGD still converges at the rate of SGD with all their batches
together (Stich, arXiv:1805.02767). Written with an outer optimizer, the difference between a worker's weights before
and after its steps is a pseudo-gradient, and averaging is one SGD step of rate one along their mean.

In a recipe a step of the loop is a step of one worker, in turn, so equal steps are equal data and equal compute; the
batch of synchronous training that it stands beside is `workers` times as large. Shards are equal here, so the mean is
not weighted. `deltax.train.islands` trains the same recipe with a process for each worker.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.distributed.exchange import Ring
from deltax.parts.distributed.replicas import Replicas, assign, flat


def average(weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of averaging: SGD of rate one."""
    return torch.optim.SGD(weights, lr=1.0)


def everyone(round: int, worker: int) -> bool:
    """Nobody misses a round."""
    return True


class LocalSteps(Replicas):
    """Rounds of `every` steps of each worker, then one step of `outer` along the mean of their pseudo-gradients.

    inner       optimizer of each worker; its state stays with the worker and is not averaged
    outer       outer(weights) -> optimizer of what the workers share
    exchange    how the mean is found, and what that sends
    attendance  attendance(round, worker) -> whether it takes part; who does not goes on from its own weights

    Raises UserError for `workers` or `every` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner: Part,
        workers: int = 4,
        every: int = 20,
        outer: Part = part(average),
        exchange: Part = part(Ring),
        attendance: Part = part(everyone),
    ):
        if every < 1:
            raise UserError(f"workers meet after at least 1 step, not {every}")
        super().__init__(model, inner=inner, workers=workers)
        self.every, self.attendance = every, attendance
        self.outer, self.exchange = outer(self.shared), exchange()
        self.exchange.prepare(workers, flat(self.shared).detach())

    def next_worker(self) -> int:
        return sum(self.taken) % len(self.taken)

    def stepped(self, worker: int) -> None:
        if self.taken[-1] and self.taken[-1] % self.every == 0 and worker == len(self.taken) - 1:
            self.meet()

    def agree(self) -> None:
        if sum(self.taken) % (self.every * len(self.taken)):
            self.meet()

    def memory(self) -> tuple[dict[str, Tensor], list[tuple[str, torch.optim.Optimizer]]]:
        return self.exchange.memory(), [("outer", self.outer)]

    @torch.no_grad()
    def meet(self) -> None:
        """One round's exchange and outer step; those present go on from what is shared."""
        round = self.taken[-1] // self.every
        present = [w for w in range(len(self.taken)) if self.attendance(round, w)]
        if not present:
            return
        start = flat(self.shared).detach()
        self.descend(self.outer, self.exchange.among({w: start - flat(self.local[w]) for w in present}))
        for worker in present:
            assign(self.local[worker], self.shared)


@paper(on=sgd, arxiv="1602.05629", year=2016)
def local_sgd(recipe: Part, *, workers: int = 4, every: int = 20) -> Part:
    return recipe.wrap("optimizer", LocalSteps, workers=workers, every=every)
