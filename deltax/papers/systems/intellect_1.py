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

from deltax import Part, claim, paper, part
from deltax.papers.optimization.diloco import diloco
from deltax.papers.systems.fsdp import fsdp
from deltax.papers.systems.opendiloco import opendiloco
from deltax.parts.exchange import Payload, Ring, ring_bytes

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


@claim
def within_the_range_a_number_moves_less_than_a_bucket():
    """Within six deviations, decoding moves a number by less than 12 / 256 of a deviation, and the mean of all, those
    beyond the range too, does not move.
    """
    torch.manual_seed(0)
    code = Int8()
    for x in (torch.randn(1001), 1e-6 * torch.randn(1001) + 3e-5, torch.randn(1001) ** 3):
        x = x.double()
        back = code.decode(code.encode(x)).double()
        inside = (x - x.mean()).abs() < 6 * x.std(correction=0)
        assert ((back - x).abs()[inside] <= code.width(x) * (1 + 1e-5)).all()
        torch.testing.assert_close(back.mean(), x.mean(), rtol=1e-5, atol=1e-12)
    assert not code.decode(code.encode(torch.zeros(5))).any()
    torch.testing.assert_close(code.decode(code.encode(torch.full((5,), 0.3))), torch.full((5,), 0.3))


@claim
def normal_numbers_lose_two_percent():
    """Of normally distributed pseudo-gradients a message loses 1.35 % in norm, 12 / 256 / sqrt(12) of a deviation, and
    the ring over 4 workers less than twice as much of its mean.
    """
    torch.manual_seed(0)
    x, code = torch.randn(4, 100_003), Int8()
    lost = lambda a, b: ((a - b).norm() / b.norm()).item()
    assert abs(lost(code.decode(code.encode(x[0])), x[0]) - 12 / 256 / 12**0.5) < 2e-4
    assert lost(Ring(code=part(Int8)).among(dict(enumerate(x))), x.mean(0)) < 2 * 12 / 256 / 12**0.5


@claim
def four_times_h_less_than_data_parallelism():
    """A ring sends 2 (P - 1) messages of N / P bytes and a codebook; without the codebooks, H steps to a meeting send
    4 H times less than a ring of float32 at every step: 400 times at H = 100.
    """
    numbers, workers, steps = 40_000, 4, 100
    ring = Ring(code=part(Int8))
    ring.among(dict(enumerate(torch.randn(workers, numbers))))
    books = 2 * (workers - 1) * 4 * BUCKETS
    assert ring.sent == ring_bytes(numbers, workers, width=1) + books
    assert steps * ring_bytes(numbers, workers) == 400 * (ring.sent - books)


@claim.measured(
    paper="int8 pseudo-gradients without loss of performance; 400 times less bandwidth (abstract, section 2)"
)
def as_good_in_eight_bits(lab):
    """DiLoCo in 8 bits ends at most 0.02 bits per byte above DiLoCo in float32, seed by seed."""
    recipe = (lab.recipe("gpt(dim=48, depth=2)") + diloco).put("loop.batch", 8)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    full, coded = ends(recipe), ends(recipe + intellect_1)
    gaps = [a - b for a, b in zip(coded, full, strict=True)]
    return lab.at_most(gaps, 0.02, unit="bits per byte", numbers={"float32": full, "int8": coded})
