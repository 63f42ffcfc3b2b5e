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
from torch import Tensor, nn

from deltax import claim, paper
from deltax.papers.systems.gpipe import (
    Order,
    Stages,
    Work,
    against,
    all_forward_all_back,
    gpipe,
    layers,
    orders,
    run,
    timed,
)


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


@claim
def with_a_flush_the_gradient_is_gpipe_s():
    """Gradients and loss are GPipe's, and those of the uncut model."""
    for count, cut in ((2, 4), (4, 6), (4, 3)):
        stages, x, y = layers(count)
        loss = against(y, cut)
        whole = torch.autograd.grad(
            nn.functional.mse_loss(nn.Sequential(*stages)(x), y), parameters := list(stages.parameters())
        )
        found = []
        for schedule in (pipedream, gpipe):
            stages.zero_grad()
            found.append((schedule(stages, x.chunk(cut), loss), [p.grad.clone() for p in parameters]))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[0][1], list(whole), rtol=1e-10, atol=1e-12)


@claim
def with_a_flush_the_bubble_is_gpipe_s():
    """As much of all time is idle as under GPipe, for any number of stages and pieces."""
    for stages in range(1, 6):
        for pieces in (1, 2, 5, 9):
            ours, theirs = (timed(order(stages, pieces)) for order in (one_forward_one_back, all_forward_all_back))
            assert abs(ours.bubble - theirs.bubble) < 1e-12


@claim
def a_stage_holds_no_more_than_its_distance_from_the_end():
    """Stage s of K holds the inputs of at most min(M, K - s) pieces, where GPipe holds M."""
    for stages, pieces in ((4, 8), (4, 2), (3, 3), (5, 20)):
        table = timed(one_forward_one_back(stages, pieces))
        assert [table.held(s) for s in range(stages)] == [min(pieces, stages - s) for s in range(stages)]


@claim
def without_a_flush_gradients_are_as_old_as_the_way_is_long():
    """Once the pipe is full, stage s of K applies gradients K - 1 - s steps late, and keeps K - s versions."""
    stages, x, y = layers(4)
    stash = Stash(stages, rate=0.05)
    stash.run(x.chunk(12), against(y, 12))
    assert [late[4:] for late in stash.stale] == [[3 - s] * 8 for s in range(4)]
    assert stash.kept == [4 - s for s in range(4)]


@claim
def a_piece_goes_back_by_the_weights_it_came_by():
    """With one stage it is descent piece by piece, to rounding; with more, another run, though of the same start."""
    ends = []
    for count in (1, 3):
        stages, x, y = layers(3)
        loss = against(y, 6)
        cut = [nn.Sequential(*stages)] if count == 1 else stages
        Stash(cut, rate=0.1).run(x.chunk(6), loss)
        ends.append(torch.cat([p.detach().flatten() for p in stages.parameters()]))
    stages, x, y = layers(3)
    optimizer = torch.optim.SGD(stages.parameters(), lr=0.1)
    for piece, target in zip(x.chunk(6), y.chunk(6)):
        optimizer.zero_grad()
        nn.functional.mse_loss(nn.Sequential(*stages)(piece), target).backward()
        optimizer.step()
    alone = torch.cat([p.detach().flatten() for p in stages.parameters()])
    torch.testing.assert_close(ends[0], alone, rtol=1e-12, atol=1e-14)
    assert (ends[1] - alone).abs().max() > 1e-4


@claim.parity(peer="torch.distributed.pipelining.Schedule1F1B")
def the_order_is_torch_s():
    """Each stage does the same work in the same order as under torch's schedule, from as many pieces as stages on."""
    from torch.distributed.pipelining import Schedule1F1B

    assert all(one_forward_one_back(k, m) == orders(Schedule1F1B, k, m) for k, m in ((2, 3), (3, 8), (4, 4)))
