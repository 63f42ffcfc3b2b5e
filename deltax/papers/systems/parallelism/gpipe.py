"""GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism.
Huang, Cheng, Bapna, Firat, Chen, Chen, Lee, Ngiam, Le, Wu, Chen, 2018. arXiv:1811.06965

Gradient descent, but layers are cut into K stages on K devices and the batch into M micro-batches.

All micro-batches go forward, then all go backward, then one step is taken: the gradient is that of the whole batch. The
cost is a bubble of (K - 1) / (M + K - 1) while the pipe fills and drains. A stage keeps only its inputs and recomputes
the rest in backward. `dx train --mesh pp=2` runs torch's engine; here a schedule is a table that can be counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltax import paper
from deltax.papers.optimization.optimizers.sgd import sgd


class Work(NamedTuple):
    """The forward or backward pass of one micro-batch through one stage."""

    back: bool
    piece: int


Order = list[list[Work]]  # for each stage, its work in order


Stages = Sequence[nn.Module] | nn.ModuleList


@paper(on=sgd, year=2018, arxiv="1811.06965")
def gpipe(stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Gradients of the mean loss over the micro-batches, in every stage; returns that loss.

    for m in 0 .. M-1:                            # forward: stage k works at tick m + k
        for stage k: keep x[k, m]; x[k+1, m] = stage_k(x[k, m])
    for m in 0 .. M-1:                            # backward
        for stage k from the last: recompute stage_k(x[k, m]); back-propagate; add gradients
    one optimizer step, by the caller
    """
    return run(timed(all_forward_all_back(len(stages), len(pieces))), stages, pieces, loss)


def all_forward_all_back(stages: int, pieces: int) -> Order:
    """GPipe's order: every micro-batch forward, then every micro-batch backward (Figure 2c)."""
    return [[Work(back, piece) for back in (False, True) for piece in range(pieces)] for _ in range(stages)]


@dataclass(frozen=True)
class Table:
    """A schedule: one row a stage, one column a tick; None is idle. Backward takes as long as forward."""

    rows: list[list[Work | None]]

    @property
    def bubble(self) -> float:
        """The share of idle ticks."""
        slots = [work for row in self.rows for work in row]
        return slots.count(None) / len(slots)

    def held(self, stage: int) -> int:
        """The most micro-batches whose inputs the stage holds at once."""
        most = now = 0
        for work in self.rows[stage]:
            now += 0 if work is None else -1 if work.back else 1
            most = max(most, now)
        return most


def timed(order: Order) -> Table:
    """A table where each stage does its next work one tick after the neighbouring stage has done it.

    Raises ValueError for an order with a deadlock.
    """
    stages = len(order)
    done: list[set[Work]] = [set() for _ in range(stages)]
    rows: list[list[Work | None]] = [[] for _ in range(stages)]
    # tick by tick, until every stage has done its order
    while any(len(done[s]) < len(order[s]) for s in range(stages)):
        now: list[Work | None] = []
        for stage in range(stages):
            work = order[stage][len(done[stage])] if len(done[stage]) < len(order[stage]) else None
            # forward needs the stage before, backward the stage after
            source = stage + 1 if work and work.back else stage - 1
            ready = work and (not 0 <= source < stages or work in done[source])
            if work and work.back:
                ready = ready and Work(False, work.piece) in done[stage]
            now.append(work if ready else None)
        if not any(now):
            raise ValueError(f"the order of {stages} stages has a deadlock at tick {len(rows[0])}: reorder its work")
        for stage, work in enumerate(now):
            rows[stage].append(work)
            if work:
                done[stage].add(work)
    return Table(rows)


def run(table: Table, stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Runs a table tick by tick. Gradients of the mean of `loss(piece, output)` add up in the stages.

    A stage keeps its input and recomputes the rest in backward. Returns the mean loss.
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
            # backward of a micro-batch: recompute the stage from its input
            x = inputs[at].pop(work.piece)
            x = x.detach().requires_grad_(x.is_floating_point())
            y = stages[at](x)
            if at + 1 == len(stages):
                y = loss(work.piece, y) / len(pieces)  # gradients add up to those of the batch's mean
                total = total + y.detach()
                y.backward()
            else:
                y.backward(back[at].pop(work.piece))
            if at:  # the gradient of the input goes to the stage before
                back[at - 1][work.piece] = x.grad
    return total
