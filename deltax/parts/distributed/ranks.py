"""Ranks in a circle, simulated in one process: their collectives, chunk by chunk, and what each rank sends."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Ranks:
    """`size` ranks, each of which sends to the next. Tensors come as one a rank, in the order of the ranks.

    `sent` counts the elements that each rank has sent, `calls` the collectives by name. A collective of P ranks over N
    elements takes P - 1 steps, in each of which every rank sends N / P elements; N is padded to a multiple of P.
    """

    def __init__(self, size: int):
        self.size = size
        self.sent = [0] * size
        self.calls: dict[str, int] = {}

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of the sum of N elements, rank r has the r-th of P chunks."""
        self._called("reduce_scatter")
        chunks = [list(self._padded(t).clone().chunk(self.size)) for t in tensors]
        for step in range(self.size - 1):
            self._pass(chunks, -step - 1, lambda here, comes: here + comes)
        return [chunks[rank][rank] for rank in range(self.size)]

    def all_gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Every rank has all shards, one after the other."""
        self._called("all_gather")
        chunks = [[torch.zeros_like(s)] * self.size for s in shards]
        for rank, shard in enumerate(shards):
            chunks[rank][rank] = shard.clone()
        for step in range(self.size - 1):
            self._pass(chunks, -step, lambda here, comes: comes)
        return [torch.cat(each) for each in chunks]

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every rank has the sum: a reduce-scatter, then an all-gather."""
        self._called("all_reduce")
        like = tensors[0]
        return [t[: like.numel()].view_as(like) for t in self.all_gather(self.reduce_scatter(tensors))]

    def _pass(self, chunks: list[list[Tensor]], ahead: int, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Every rank r sends its chunk r + ahead to the next, all at the same time."""
        moving = [(rank + ahead) % self.size for rank in range(self.size)]
        sent = [chunks[rank][i].clone() for rank, i in enumerate(moving)]
        for rank, (i, chunk) in enumerate(zip(moving, sent)):
            to = (rank + 1) % self.size
            chunks[to][i] = join(chunks[to][i], chunk)
            self.sent[rank] += chunk.numel()

    def _padded(self, tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % self.size))

    def _called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, in order."""
    return torch.cat([t.flatten() for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes from their elements; what is left over is padding."""
    pieces = vector.split([*(t.numel() for t in like), vector.numel() - sum(t.numel() for t in like)])
    return [piece.view_as(t) for piece, t in zip(pieces, like)]
