"""Claims of intellect-1: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim, part
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.papers.systems.decentralized.intellect_1 import BUCKETS, Int8, intellect_1
from deltax.parts.distributed.exchange import Ring, ring_bytes


@claim
def within_the_range_a_number_moves_less_than_a_bucket():
    """For three distributions, decoding moves a number within six deviations by less than a bucket (12 / 256 of a
    deviation), and keeps the mean.
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
    """For normal numbers, a message loses 1.35 % in norm (12 / 256 / sqrt(12)), and a ring of 4 workers less than twice
    that.
    """
    torch.manual_seed(0)
    x, code = torch.randn(4, 100_003), Int8()
    lost = lambda a, b: ((a - b).norm() / b.norm()).item()
    assert abs(lost(code.decode(code.encode(x[0])), x[0]) - 12 / 256 / 12**0.5) < 2e-4
    assert lost(Ring(code=part(Int8)).among(dict(enumerate(x))), x.mean(0)) < 2 * 12 / 256 / 12**0.5


@claim
def four_times_h_less_than_data_parallelism():
    """Over 4 workers, without codebooks, synchronising every 100 steps in 8 bits sends 400 times less than a float32
    ring at each step.
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
    """On gpt (3 seeds, 800 steps), DiLoCo in 8 bits finishes at most 0.02 bits/byte above DiLoCo in float32."""
    recipe = (lab.recipe("gpt(dim=48, depth=2)") + diloco).put("loop.batch", 8)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    full, coded = ends(recipe), ends(recipe + intellect_1)
    gaps = [a - b for a, b in zip(coded, full, strict=True)]
    return lab.at_most(gaps, 0.02, unit="bits per byte", numbers={"float32": full, "int8": coded})
