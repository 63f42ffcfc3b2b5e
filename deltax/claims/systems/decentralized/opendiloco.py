"""Claims of opendiloco: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim, part
from deltax.papers.optimization.local_updates.diloco import unreliable
from deltax.papers.systems.decentralized.opendiloco import Half, opendiloco
from deltax.parts.distributed.exchange import Ring, ring_bytes


@claim
def half_the_bytes():
    """Over 4 workers and 997 numbers, a round in float16 sends half the bytes of one in float32."""
    torch.manual_seed(0)
    vectors = dict(enumerate(torch.randn(4, 997)))
    half, full = Ring(code=part(Half)), Ring()
    half.among(vectors)
    full.among(vectors)
    assert half.sent == ring_bytes(997, 4, width=2) and full.sent == 2 * half.sent


@claim
def a_hop_loses_eleven_bits_down():
    """For 2, 3 and 7 workers, the float16 ring's mean is off by at most P + 1 roundings of 2^-11 of the summed
    magnitudes.
    """
    torch.manual_seed(0)
    for workers in (2, 3, 7):
        for scale in (1e-3, 1.0):
            vectors = scale * torch.randn(workers, 301)
            error = (Ring(code=part(Half)).among(dict(enumerate(vectors))) - vectors.mean(0)).abs()
            assert (error <= (workers + 1) * 2.0**-11 * vectors.abs().sum(0)).all() and error.any()


@claim
def numbers_too_large_are_held():
    """Numbers beyond float16's range are decoded as +-65504, not infinity."""
    wild = torch.tensor([1e6, -1e9, 1.0])
    assert Half().decode(Half().encode(wild)).tolist() == [65504.0, -65504.0, 1.0]


@claim.measured(paper="FP16 pseudo-gradients without loss of performance (section 4)")
def as_good_in_half(lab):
    """On gpt (3 seeds, 800 steps), DiLoCo in float16 finishes at most 0.01 bits/byte above DiLoCo in float32."""
    recipe = lab.recipe("gpt(dim=48, depth=2)+diloco").put("loop.batch", 8)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    full, half = ends(recipe), ends(recipe + opendiloco)
    gaps = [a - b for a, b in zip(half, full, strict=True)]
    return lab.at_most(gaps, 0.01, unit="bits per byte", numbers={"float32": full, "float16": half})


@claim.measured(paper="workers may join and leave (section 3)")
def a_missing_worker_does_not_break_it(lab):
    """On gpt (3 seeds, 800 steps), with each worker missing a round with probability 0.3, it finishes at most 0.05
    bits/byte higher.
    """
    recipe = lab.recipe("gpt(dim=48, depth=2)+diloco+opendiloco").put("loop.batch", 8)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=800).score for s in lab.seeds(3)]
    whole, dropped = ends(recipe), ends(recipe.fill("attendance", unreliable))
    gaps = [a - b for a, b in zip(dropped, whole, strict=True)]
    return lab.at_most(gaps, 0.05, unit="bits per byte", numbers={"all present": whole, "0.3 missing": dropped})
