"""PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
Li, Zhao, Varma, Salpekar, Noordhuis, Li, Paszke, Smith, Vaughan, Damania, Chintala, 2020. arXiv:2006.15704

Gradient descent, but every worker has the model and a share of the batch, and they average gradients bucket by bucket.

A mean over the batch is a mean of means, so workers need to agree on nothing but the gradient. The backward pass
finishes the last layers first; a bucket of gradients travels while the layers before it are still at work. The engine
that `dx train --mesh dp=2` runs is torch's own; here are its buckets, its sum around a ring, and its clock.
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
    """The ranks' gradients, one list of tensors a rank, each replaced by its mean over the ranks (Algorithm 1).

    Buckets of at least `bucket` bytes are summed around the ring, the last parameters' first (section 3.2.3).
    """
    averaged: list[dict[int, Tensor]] = [{} for _ in gradients]
    for indices in reversed(buckets(gradients[0], bucket)):
        packed = [flat([rank[i] for i in indices]) for rank in gradients]
        for mine, total in zip(averaged, ring.all_reduce(packed)):
            mine.update(zip(indices, unflat(total / ring.size, [gradients[0][i] for i in indices])))
    return [[mine[i] for i in range(len(mine))] for mine in averaged]


def buckets(tensors: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Indices in order, a new bucket begun where the one before has reached `limit` bytes."""
    made: list[list[int]] = []
    held = limit
    for i, tensor in enumerate(tensors):
        if held >= limit:
            made.append([])
            held = 0
        made[-1].append(i)
        held += tensor.numel() * tensor.element_size()
    return made


def finish(compute: Sequence[float], wire: Sequence[float]) -> float:
    """When the last bucket has arrived: bucket i is ready after compute[0..i], and the wire carries one at a time."""
    ready = sent = 0.0
    for working, travelling in zip(compute, wire, strict=True):
        ready += working
        sent = max(ready, sent) + travelling
    return sent
