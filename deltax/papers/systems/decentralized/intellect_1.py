"""INTELLECT-1 Technical Report.
Jaghouar, Ong, Basra, Obeid, Straube, Keiblinger, Bakouch, Atkins, Panahi, Goddard, Ryabinin, Hagemann,
2024. arXiv:2412.01152

OpenDiLoCo, but pseudo-gradients are sent in 8 bits, with FSDP inside each island, and islands join and leave.

256 buckets cover six standard deviations on either side of the mean, and each bucket is decoded as the mean of its
numbers. Sums are kept in 32 bits and encoded again at every hop. Synchronising every 100 steps at a quarter of the
bytes is 400 times less traffic than all-reducing float32 gradients. `deltax.train.islands` has the elastic mesh: a dead
worker is left out, and a returning one receives the weights from a peer.
"""

import torch
from torch import Tensor

from deltax import Part, paper
from deltax.papers.systems.decentralized.opendiloco import opendiloco
from deltax.papers.systems.parallelism.fsdp import fsdp
from deltax.parts.distributed.exchange import Payload

BUCKETS = 256


class Int8:
    """8-bit code: 256 buckets over mean +- `sigmas` standard deviations, each decoded as the mean of its numbers.

    A message has N bytes and a codebook of 256 float32. Numbers beyond the range are in the first or last bucket.
    """

    def __init__(self, *, sigmas: float = 6.0):
        self.sigmas = sigmas

    def width(self, vector: Tensor) -> Tensor:
        """Width of a bucket."""
        return 2 * self.sigmas * vector.std(correction=0) / BUCKETS

    def encode(self, vector: Tensor) -> Payload:
        width = self.width(vector)
        # bucket 128 begins at the mean; a constant vector has width 0
        place = ((vector - vector.mean()) / width.clamp(min=1e-30)).floor() + BUCKETS // 2
        place = place.clamp(0, BUCKETS - 1).long()
        # codebook: the mean of each bucket's numbers, which keeps the vector's mean
        total = torch.zeros(BUCKETS, dtype=vector.dtype, device=vector.device).index_add_(0, place, vector)
        codebook = total / place.bincount(minlength=BUCKETS).clamp(min=1)
        return place.to(torch.uint8), codebook.float()

    def decode(self, payload: Payload) -> Tensor:
        place, codebook = payload
        return codebook[place.long()]


@paper(on=(opendiloco, fsdp), arxiv="2412.01152", year=2024, whole="gpt+diloco")
def intellect_1(recipe: Part, *, sigmas: float = 6.0) -> Part:
    return recipe.fill("code", Int8, sigmas=sigmas)
