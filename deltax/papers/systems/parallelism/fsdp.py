"""PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel.
Zhao, Gu, Varma, Luo, Huang, Xu, Wright, Shojanazeri, Ott, Shleifer, and others, 2023. arXiv:2304.11277

ZeRO's stage 3, but each module is one flat sharded parameter, gathered just before use and freed just after.

While one unit computes, the next one is gathered, so communication overlaps with computing, and at most two units are
whole at a time. `dx train --mesh fsdp=2` runs FSDP2, which shards each parameter by itself (`fully_shard`); here are
the paper's flat units, with a count of the elements that a rank holds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltax import paper
from deltax.papers.systems.parallelism.gpipe import Stages
from deltax.papers.systems.parallelism.zero import zero
from deltax.parts.distributed.ranks import Ranks, flat, unflat


class Sharded:
    """A sequence of units over a ring of ranks. `most` is the largest number of parameter elements that a rank has
    held.

    Between uses, a unit is a shard (N / F,) on each rank, padded to a multiple of the ring's size.
    """

    def __init__(self, units: Stages, ring: Ranks):
        self.units, self.ring = units, ring
        whole = [flat([p.detach() for p in unit.parameters()]) for unit in units]
        padded = [nn.functional.pad(w, (0, -w.numel() % ring.size)) for w in whole]
        self.shards = [list(w.clone().chunk(ring.size)) for w in padded]
        self.held = self.most = sum(shards[0].numel() for shards in self.shards)

    def gradients(self, inputs: Sequence[Tensor], losses: Sequence[Callable[[Tensor], Tensor]]) -> list[list[Tensor]]:
        """For each unit, the shards of the gradient of the ranks' mean loss; one input and one loss a rank.

        A unit keeps its inputs; backward gathers its weights again and recomputes it.
        """
        count, kept = len(self.units), [list(inputs)]
        for at, whole in enumerate(self._gathered(range(count))):
            # forward: only the units' inputs are kept
            with torch.no_grad():
                kept.append([self._call(at, w, x) for w, x in zip(whole, kept[-1])])
        back: list[Tensor | None] = [None] * self.ring.size
        found: list[list[Tensor]] = []
        for whole, at in zip(self._gathered(reversed(range(count))), reversed(range(count))):
            summed = []
            for rank, (weights, x) in enumerate(zip(whole, kept[at])):
                weights, x = weights.detach().requires_grad_(), x.detach().requires_grad_()
                # backward recomputes the unit; <y, dL/dy> has the gradient of the chain rule
                y = self._call(at, weights, x)
                y = losses[rank](y) if at == count - 1 else (y * back[rank]).sum()
                gradient, back[rank] = torch.autograd.grad(y, (weights, x))
                summed.append(gradient / self.ring.size)
            # each rank keeps its shard (N / F,) of the mean gradient
            found.insert(0, self.ring.reduce_scatter(summed))
        return found

    def _gathered(self, order: Iterable[int]) -> Iterator[list[Tensor]]:
        """Each unit's weights on every rank; the next unit is gathered while this one is used, then this one is
        freed.
        """
        order = list(order)
        coming = self._gather(order[0])
        for following in [*order[1:], None]:
            # prefetch: unit i + 1 is gathered before unit i is used
            whole, coming = coming, None if following is None else self._gather(following)
            yield whole
            self.held -= whole[0].numel()

    def _gather(self, at: int) -> list[Tensor]:
        whole = self.ring.all_gather(self.shards[at])
        self.held += whole[0].numel()
        self.most = max(self.most, self.held)
        return whole

    def _call(self, at: int, weights: Tensor, x: Tensor) -> Tensor:
        names, parameters = zip(*self.units[at].named_parameters())
        return functional_call(self.units[at], dict(zip(names, unflat(weights, parameters))), (x,))


@paper(on=zero, year=2023, arxiv="2304.11277")
def fsdp(units: Stages, ranks: int) -> Sharded:
    """The units, each as one flat parameter, sharded over the ranks."""
    return Sharded(units, Ranks(ranks))


def hybrid(gradients: Sequence[Tensor], group: int) -> tuple[list[Tensor], int]:
    """Shards of the ranks' mean gradient (N,): sharded in groups of `group` ranks, replicated over the groups.

    Reduce-scatter in each group, then all-reduce of equal shards over the groups (section 3.2.2). Returns each rank's
    shard, and the elements that rank 0 sent to other groups.
    """
    world = len(gradients)
    shards: list[Tensor] = []
    for first in range(0, world, group):
        shards += Ranks(group).reduce_scatter(gradients[first : first + group])
    # one ring for each shard index, over the W / F groups
    between = [Ranks(world // group) for _ in range(group)]
    for i, ring in enumerate(between):
        shards[i::group] = [s / world for s in ring.all_reduce(shards[i::group])]
    return shards, between[0].sent[0]
