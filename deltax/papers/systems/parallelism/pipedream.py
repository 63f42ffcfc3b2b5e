"""PipeDream: Generalized Pipeline Parallelism for DNN Training.
Narayanan, Harlap, Phanishayee, Seshadri, Devanur, Ganger, Gibbons, Zaharia, 2019. doi:10.1145/3341301.3359646

GPipe, but a piece goes back as soon as it can: each stage does one forward, one backward, and holds few pieces.

With a flush after every batch (PipeDream-Flush, arXiv:2006.09503, what Megatron and `dx train --mesh pp=2` run) the
gradient and the bubble are GPipe's, and only the memory is smaller. Without one there is no bubble either: every
backward pass is followed by a step, the stages far from the end step on gradients of older weights, and each stage
keeps the versions its pieces began with, so that a piece goes back through the weights it came by.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.systems.parallelism.gpipe import Order, Stages, Work, gpipe, run, timed


def one_forward_one_back(stages: int, pieces: int) -> Order:
    """Stage s takes in K - 1 - s pieces, then alternates, then lets the rest go back (Figure 4)."""
    order = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, pieces)
        row = [Work(False, piece) for piece in range(ahead)]
        for piece in range(pieces - ahead):
            row += [Work(False, ahead + piece), Work(True, piece)]
        order.append(row + [Work(True, piece) for piece in range(pieces - ahead, pieces)])
    return order


@paper(on=gpipe, year=2019, arxiv="1806.03377")
def pipedream(stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Gradients of the mean loss over the pieces of a batch, one forward, one back, with a flush; returns that loss."""
    return run(timed(one_forward_one_back(len(stages), len(pieces))), stages, pieces, loss)


class Stash:
    """Stages that never flush: each steps after each backward pass, and keeps the weights that its pieces came by.

    `versions[s][piece]` is how many steps stage s had taken when the piece came; `stale[s]` how many more when its
    gradient was applied; `kept[s]` the most versions it held at once.
    """

    def __init__(self, stages: Stages, *, rate: float):
        self.stages, self.rate = stages, rate
        self.steps = [0] * len(stages)
        self.versions: list[dict[int, int]] = [{} for _ in stages]
        self.stale: list[list[int]] = [[] for _ in stages]
        self.kept = [0] * len(stages)

    def run(
        self, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]
    ) -> dict[tuple[int, int], tuple[Tensor, ...]]:
        """Train on the pieces in turn. Returns the weights of each (stage, piece) as they were both ways."""
        count = len(self.stages)
        came: list[dict[int, Tensor]] = [dict(enumerate(pieces)), *({} for _ in range(count - 1))]
        back: list[dict[int, Tensor]] = [{} for _ in range(count)]
        stash: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(count)]
        used = {}
        for tick in zip(*timed(one_forward_one_back(count, len(pieces))).rows):
            for at, work in [(at, work) for at, work in enumerate(tick) if work]:
                stage, piece = self.stages[at], work.piece
                if not work.back:
                    stash[at][piece] = {name: p.detach().clone() for name, p in stage.named_parameters()}
                    self.versions[at][piece] = self.steps[at]
                    held = {self.versions[at][p] for p in stash[at]}
                    self.kept[at] = max(self.kept[at], len(held))
                    if at + 1 < count:
                        came[at + 1][piece] = stage(came[at][piece]).detach()
                    continue
                weights = {name: w.requires_grad_() for name, w in stash[at].pop(piece).items()}
                x = came[at].pop(piece).detach().requires_grad_()
                y = torch.func.functional_call(stage, weights, (x,))
                y = loss(piece, y) if at + 1 == count else (y * back[at].pop(piece)).sum()
                into, *gradients = torch.autograd.grad(y, [x, *weights.values()])
                if at:
                    back[at - 1][piece] = into
                with torch.no_grad():
                    for parameter, gradient in zip(stage.parameters(), gradients):
                        parameter -= self.rate * gradient
                self.stale[at].append(self.steps[at] - self.versions[at][piece])
                self.steps[at] += 1
                used[at, piece] = tuple(w.detach() for w in weights.values())
        return used
