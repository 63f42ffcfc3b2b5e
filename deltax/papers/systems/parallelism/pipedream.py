"""PipeDream: Generalized Pipeline Parallelism for DNN Training.
Narayanan, Harlap, Phanishayee, Seshadri, Devanur, Ganger, Gibbons, Zaharia, 2019. doi:10.1145/3341301.3359646

GPipe, but each stage alternates one forward and one backward pass, so it holds few micro-batches.

With a flush after every batch (PipeDream-Flush, arXiv:2006.09503, which Megatron and `dx train --mesh pp=2` run) the
gradient and the bubble are GPipe's, with less memory. Without a flush there is no bubble: every backward pass is
followed by a step, so stage s of K applies gradients K - 1 - s steps late, and each stage stashes the weights of its
micro-batches, so that backward uses the weights of forward.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.systems.parallelism.gpipe import Order, Stages, Work, gpipe, run, timed


def one_forward_one_back(stages: int, pieces: int) -> Order:
    """Stage s of K: K - 1 - s forwards, then one forward and one backward in turn, then the rest (Figure 4)."""
    order = []
    for stage in range(stages):
        # warm-up, then 1F1B, then drain
        ahead = min(stages - 1 - stage, pieces)
        row = [Work(False, piece) for piece in range(ahead)]
        for piece in range(pieces - ahead):
            row += [Work(False, ahead + piece), Work(True, piece)]
        order.append(row + [Work(True, piece) for piece in range(pieces - ahead, pieces)])
    return order


@paper(on=gpipe, year=2019, arxiv="1806.03377")
def pipedream(stages: Stages, pieces: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Gradients of the mean loss over the micro-batches, 1F1B with a flush; returns that loss.

    stage s of K:
        for m in 0 .. K-2-s:          forward(m)            # warm-up
        for m in 0 .. M-K+s:          forward(m + K-1-s); backward(m)
        for the last K-1-s:           backward(m)           # drain
    without a flush (`Stash`): step after every backward(m), with the weights that forward(m) used
    """
    return run(timed(one_forward_one_back(len(stages), len(pieces))), stages, pieces, loss)


class Stash:
    """Stages without a flush: each steps after each backward pass and stashes the weights of its micro-batches.

    `versions[s][piece]`: steps of stage s before the piece's forward. `stale[s]`: steps between its forward and its
    gradient's application. `kept[s]`: the most weight versions held at once.
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
        """Trains on the pieces in turn. Returns the weights used for each (stage, piece)."""
        count = len(self.stages)
        came: list[dict[int, Tensor]] = [dict(enumerate(pieces)), *({} for _ in range(count - 1))]
        back: list[dict[int, Tensor]] = [{} for _ in range(count)]
        stash: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(count)]
        used = {}
        for tick in zip(*timed(one_forward_one_back(count, len(pieces))).rows):
            for at, work in [(at, work) for at, work in enumerate(tick) if work]:
                stage, piece = self.stages[at], work.piece
                if not work.back:
                    # weight stashing: backward of this micro-batch uses these weights
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
                # w <- w - rate g, on the newest weights, with the gradient at the stashed ones
                with torch.no_grad():
                    for parameter, gradient in zip(stage.parameters(), gradients):
                        parameter -= self.rate * gradient
                self.stale[at].append(self.steps[at] - self.versions[at][piece])
                self.steps[at] += 1
                used[at, piece] = tuple(w.detach() for w in weights.values())
        return used
