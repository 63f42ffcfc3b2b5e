"""Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism.
Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro, 2019. arXiv:1909.08053

A transformer, but attention and MLP are cut over ranks, first maps by columns and last maps by rows.

Heads, and hidden units, are independent until the last map sums them. Each rank computes its own from the stream to a
partial sum, so a block needs one all-reduce a branch in forward and one in backward. `dx train --mesh tp=2` runs
torch's engine over processes; here the ranks are simulated in one process.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltax import Part, paper
from deltax.contract import needs
from deltax.papers.language.models.transformer import transformer
from deltax.parts.attention.context import Context, takes_context
from deltax.parts.attention.scores import of_heads
from deltax.parts.distributed.ranks import Ranks
from deltax.shapes import Stream

_ROWS = {"out", "down"}


@needs(inner=("Attention", "CrossAttention", "MLP", "SwiGLU"), outside=("LoRA", "QPooled", "InSpan"))
class Split(nn.Module):
    """A branch computed by ranks, each with some of its heads or hidden units. Stream (B, T, D) -> (B, T, D).

    The parameters are the branch's own, under its names. Raises ValueError where the ranks do not divide them.
    """

    def __init__(self, dim: int, *, inner: Part, ranks: int = 2):
        super().__init__()
        self.inner = inner(dim)
        self.ring = Ranks(ranks)
        self._ranks = [_of_rank(self.inner, rank, ranks) for rank in range(ranks)]

    def forward(self, x: Stream, ctx: Context) -> Stream:
        parts = []
        for rank, (branch, here) in enumerate(zip(self._ranks, Spread.apply(x, self.ring))):
            shard = {name: _shard(name, p, rank, self.ring.size) for name, p in self.inner.named_parameters()}
            # the branch runs with the rank's shard of every parameter
            shard |= dict(self.inner.named_buffers())
            parts.append(functional_call(branch, shard, (here, ctx) if takes_context(branch) else (here,)))
        return Gather.apply(self.ring, *parts)


@paper(on=transformer, year=2019, arxiv="1909.08053")
def megatron(recipe: Part, *, ranks: int = 2) -> Part:
    return recipe.wrap("mixer", Split, ranks=ranks).wrap("mlp", Split, ranks=ranks)


class Spread(torch.autograd.Function):
    """f (section 3): identity in forward, all-reduce of the gradients in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ranks) -> tuple[Tensor, ...]:
        ctx.ring = ring
        return tuple(x.clone() for _ in range(ring.size))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ring.all_reduce(gradients)[0], None


class Gather(torch.autograd.Function):
    """g (section 3): all-reduce of partial sums in forward, identity in backward."""

    @staticmethod
    def forward(ctx: Any, ring: Ranks, *parts: Tensor) -> Tensor:
        ctx.size = ring.size
        return ring.all_reduce(parts)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, *tuple[Tensor, ...]]:
        return None, *(gradient.clone() for _ in range(ctx.size))


def _of_rank(branch: nn.Module, rank: int, ranks: int) -> nn.Module:
    """A copy of the branch with 1 / P of the heads."""
    branch = deepcopy(branch)
    if project := getattr(branch, "project", None):
        if project.heads % ranks:
            raise ValueError(f"{ranks} ranks do not divide {project.heads} heads: choose a divisor")
        project.heads //= ranks
        of_heads(branch, first=rank * project.heads)
    elif branch.down.in_features % ranks:
        raise ValueError(f"{ranks} ranks do not divide {branch.down.in_features} hidden units: choose a divisor")
    return branch


def _shard(name: str, parameter: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's columns or rows of a parameter."""
    *_, owner, kind = name.split(".")
    if owner in _ROWS:
        # row-parallel: weight (out, in / P); the bias is added by rank 0 only
        return parameter.chunk(ranks, 1)[rank] if kind == "weight" else parameter * (rank == 0)
    return parameter.chunk(ranks)[rank]  # column-parallel: (out / P, in)


def cross_entropy(logits: list[Tensor], targets: Tensor, ring: Ranks) -> Tensor:
    """Cross-entropy of each target (N,), with logits (N, V) cut over the ranks by vocabulary, in equal parts (section
    3).

    Three numbers a token are exchanged (maximum, sum of exponentials, target's logit), and no logits.
    """
    each = logits[0].shape[-1]
    largest = torch.stack([x.detach().max(-1).values for x in logits]).max(0).values
    sums, said = [], []
    for rank, x in enumerate(logits):
        x = x - largest[:, None]
        # only one rank has the target's logit; the others add 0
        here = targets - rank * each
        mine = (here >= 0) & (here < each)
        sums.append(x.exp().sum(-1))
        said.append(x.gather(-1, here.clamp(0, each - 1)[:, None])[:, 0] * mine)
    # log sum exp(x - m) - (x_target - m)
    return Gather.apply(ring, *sums).log() - Gather.apply(ring, *said)
