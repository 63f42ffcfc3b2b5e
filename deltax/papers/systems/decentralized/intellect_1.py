"""INTELLECT-1 Technical Report.
Jaghouar, Ong, Basra, Obeid, Straube, Keiblinger, Bakouch, Atkins, Panahi, Goddard, Ryabinin, Hagemann,
2024. arXiv:2412.01152

OpenDiLoCo, but its pseudo-gradients go round the ring in 8 bits, with FSDP inside each island and islands that come and
go while 10 billion parameters train.

A code of 256 buckets spans six standard deviations to either side of the mean, and each bucket stands for the mean of
what fell into it. Sums are kept in 32 bits and coded anew at every hop, so that no error is coded twice. Meeting after
every 100 steps in a quarter of the bytes is 400 times less traffic than averaging gradients in float32. The elastic
mesh is `deltax.train.islands`: who dies is left out, who returns is handed the weights by a peer.
"""

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.systems.decentralized.opendiloco import opendiloco
from deltax.papers.systems.parallelism.fsdp import fsdp
from deltax.parts.distributed.exchange import Payload

BUCKETS = 256


class Int8:
    """Each number as one of 256 buckets over mean +- `sigmas` standard deviations, decoded as the mean of its bucket.

    A message has N bytes and a codebook of 256 float32. Numbers beyond the range fall into the last bucket.
    """

    def __init__(self, *, sigmas: float = 6.0):
        self.sigmas = sigmas

    def width(self, vector: Tensor) -> Tensor:
        """How wide a bucket is."""
        return 2 * self.sigmas * vector.std(correction=0) / BUCKETS

    def encode(self, vector: Tensor) -> Payload:
        width = self.width(vector)
        place = ((vector - vector.mean()) / width.clamp(min=1e-30)).floor() + BUCKETS // 2
        place = place.clamp(0, BUCKETS - 1).long()
        total = torch.zeros(BUCKETS, dtype=vector.dtype, device=vector.device).index_add_(0, place, vector)
        codebook = total / place.bincount(minlength=BUCKETS).clamp(min=1)
        return place.to(torch.uint8), codebook.float()

    def decode(self, payload: Payload) -> Tensor:
        place, codebook = payload
        return codebook[place.long()]


@paper(on=(opendiloco, fsdp), arxiv="2412.01152", year=2024, whole="gpt+diloco")
def intellect_1(recipe: Part, *, sigmas: float = 6.0) -> Part:
    return recipe.fill("code", Int8, sigmas=sigmas)
