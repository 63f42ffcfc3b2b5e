"""GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism.
Huang, Cheng, Bapna, Firat, Chen, Chen, Lee, Ngiam, Le, Wu, Chen, 2018. arXiv:1811.06965

Gradient descent, but the layers are cut into stages, each on its own device, and the batch into pieces that stream by.

All pieces go forward, then all go back, then one step is taken: the gradient is that of the whole batch, and the price
is a bubble while the pipe fills and drains. A stage keeps only what entered it, and computes its inside again on the
way back. `dx train --mesh pp=2` runs torch's engine; here a schedule is a table that can be counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltax import paper
from deltax.papers.optimization.optimizers.sgd import sgd


class Work(NamedTuple):
    """One piece passing one stage, forward or back."""

    back: bool
    piece: int


Order = list[list[Work]]  # what each stage does, in order
Stages = Sequence[nn.Module] | nn.ModuleList


@dataclass(frozen=True)
class Table:
    """When each stage does what: a row a stage, a column a tick; None is idle. Back takes as long as forward."""

    rows: list[list[Work | None]]

    @property
    def bubble(self) -> float:
        """The share of all ticks of all stages that is idle."""
        slots = [work for row in self.rows for work in row]
        return slots.count(None) / len(slots)

    def held(self, stage: int) -> int:
        """The most pieces whose inputs the stage holds at once, waiting for their way back."""
        most = now = 0
        for work in self.rows[stage]:
            now += 0 if work is None else -1 if work.back else 1
            most = max(most, now)
        return most


def all_forward_all_back(stages: int, pieces: int) -> Order:
    """GPipe's order: every piece forward, then every piece back (Figure 2c)."""
    return [[Work(back, piece) for back in (False, True) for piece in range(pieces)] for _ in range(stages)]


def timed(order: Order) -> Table:
    """Each stage does its next work as soon as the neighbour has done that piece, in an earlier tick.

    Raises ValueError for an order in which stages wait for each other forever.
    """
    stages = len(order)
    done: list[set[Work]] = [set() for _ in range(stages)]
    rows: list[list[Work | None]] = [[] for _ in range(stages)]
    while any(len(done[s]) < len(order[s]) for s in range(stages)):
        now: list[Work | None] = []
        for stage in range(stages):
            work = order[stage][len(done[stage])] if len(done[stage]) < len(order[stage]) else None
            source = stage + 1 if work and work.back else stage - 1
            ready = work and (not 0 <= source < stages or work in done[source])
            if work and work.back:
                ready = ready and Work(False, work.piece) in done[stage]
            now.append(work if ready else None)
        if not any(now):
            raise ValueError("every stage waits for another")
        for stage, work in enumerate(now):
            rows[stage].append(work)
            if work:
                done[stage].add(work)
    return Table(rows)


def run(table: Table, stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Do what the table says, tick by tick; gradients of the mean of `loss(piece, output)` add up in the stages.

    A stage keeps its input and computes the rest again on the way back. Returns the mean loss.
    """
    inputs: list[dict[int, Tensor]] = [dict(enumerate(pieces)), *({} for _ in stages[1:])]
    back: list[dict[int, Tensor]] = [{} for _ in stages]
    total = torch.zeros((), dtype=pieces[0].dtype if pieces[0].is_floating_point() else None)
    for tick in zip(*table.rows):
        for at, work in enumerate(tick):
            if work is None:
                continue
            if not work.back:
                with torch.no_grad():
                    if at + 1 < len(stages):
                        inputs[at + 1][work.piece] = stages[at](inputs[at][work.piece])
                continue
            x = inputs[at].pop(work.piece)
            x = x.detach().requires_grad_(x.is_floating_point())
            y = stages[at](x)
            if at + 1 == len(stages):
                y = loss(work.piece, y) / len(pieces)
                total = total + y.detach()
                y.backward()
            else:
                y.backward(back[at].pop(work.piece))
            if at:
                back[at - 1][work.piece] = x.grad
    return total


@paper(on=sgd, year=2018, arxiv="1811.06965")
def gpipe(stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Gradients of the mean loss over the pieces of a batch, in every stage; returns that loss."""
    return run(timed(all_forward_all_back(len(stages), len(pieces))), stages, pieces, loss)
