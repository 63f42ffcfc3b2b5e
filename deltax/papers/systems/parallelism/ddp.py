"""PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
Li, Zhao, Varma, Salpekar, Noordhuis, Li, Paszke, Smith, Vaughan, Damania, Chintala, 2020. arXiv:2006.15704

Gradient descent, but each worker has the model and a share of the batch, and gradients are averaged in buckets.

The gradient of a mean over the batch is the mean of the workers' gradients, if their shares are equal. The backward
pass finishes the last layers first, so the all-reduce of their bucket overlaps with the backward pass of earlier
layers. `dx train --mesh dp=2` runs torch's DDP; here are its buckets and its all-reduce around a ring.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.distributed.ranks import Ranks, flat, unflat

Arrival = torch.futures.Future[Tensor]


@paper(on=sgd, year=2020, arxiv="2006.15704")
def ddp(gradients: Sequence[Sequence[Tensor]], ring: Ranks, *, bucket: int = 25 * 2**20) -> list[list[Tensor]]:
    """The mean over the ranks of their gradients, one list of tensors a rank (Algorithm 1).

    Buckets of at least `bucket` bytes are all-reduced around the ring, last parameters first (section 3.2.3).
    """
    averaged: list[dict[int, Tensor]] = [{} for _ in gradients]
    # last parameters first: backward finishes them first
    for indices in reversed(buckets(gradients[0], bucket)):
        # one all-reduce a bucket: each rank sends 2 (P - 1) / P of it
        packed = [flat([rank[i] for i in indices]) for rank in gradients]
        # the sum of the ranks' gradients, divided by P
        for mine, total in zip(averaged, ring.all_reduce(packed)):
            mine.update(zip(indices, unflat(total / ring.size, [gradients[0][i] for i in indices])))
    return [[mine[i] for i in range(len(mine))] for mine in averaged]


def buckets(tensors: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Indices in order; a new bucket begins once the current one has `limit` bytes or more."""
    made: list[list[int]] = []
    held = limit
    for i, tensor in enumerate(tensors):
        if held >= limit:
            made.append([])
            held = 0
        made[-1].append(i)
        held += tensor.numel() * tensor.element_size()
    return made
