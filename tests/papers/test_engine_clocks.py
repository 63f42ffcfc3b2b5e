"""What is timed on two processes is torch's engine at the papers' work, and the claims on it can fail."""

import pytest
import torch
from torch import distributed, nn

from deltax.claims.systems.parallelism import ddp, gpipe
from deltax.claims.systems.parallelism import ddp as ddp_claims
from deltax.claims.systems.parallelism import gpipe as gpipe_claims
from deltax.lab.lab import Lab
from deltax.lab.store import Store
from deltax.parts.distributed import ring
from deltax.parts.distributed.ring import in_processes


@pytest.fixture
def lab(tmp_path):
    return Lab(Store(tmp_path))


def both_engines(ring):
    return gpipe_claims._worked(ring, 8, 6, (1, 2, 4), 2), ddp_claims._clocked(ring, 3, 24, 1e9, 2), averaged(ring)


def averaged(ring):
    """Gradients of DDP over the slow wire, and the mean of both processes' own."""
    model = nn.Linear(5, 3).double()
    torch.manual_seed(0)
    nn.init.normal_(model.weight)
    nn.init.normal_(model.bias)
    shares = torch.randn(2, 7, 5, dtype=torch.float64)
    engine = nn.parallel.DistributedDataParallel(model)
    with ddp.ThreadPoolExecutor(1) as thread:

        def hook(_, bucket: distributed.GradBucket) -> ddp.Arrival:
            return ddp_claims._sent(thread, 1e9, bucket.buffer())

        engine.register_comm_hook(None, hook)
        engine(shares[ring.rank]).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    wanted = torch.autograd.grad(model(shares).square().mean(), list(model.parameters()))
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def test_two_processes_run_what_is_timed():
    found = in_processes(2, both_engines, patience=100)
    assert not any(isinstance(f, Exception) for f in found), found
    for pipeline, replica, off in found:
        assert [len(turn) for turn in pipeline] == [3, 3]
        assert all(0 < busy < took for turn in pipeline for busy, took in turn)
        assert len(replica) == 2 and off < 1e-12
        for turn in replica:
            assert len(turn.ready) == 3 and len(turn.wire) == 4 and turn.ready == sorted(turn.ready)
            assert min(*turn.ready, *turn.wire, turn.many, turn.one) > 0
            assert turn.wire[-1] >= 3 * 24**2 * 4 / 1e9


def pipeline(waits):
    """Two stages whose pieces take as long as those of one batch together, with so many ticks of waiting on top."""
    turn = [(2.0, 2.0 / pieces * (pieces + 1 + waits)) for pieces in (1, 2, 4, 8)]
    return [[turn] * 6] * 2


@pytest.mark.parametrize(("waits", "outcome"), [(0, "supported"), (1, "opposite")])
def test_a_pipeline_that_waits_is_seen(lab, monkeypatch, waits, outcome):
    near = [[[(b * (1 + i / 1000), t) for b, t in turn] for i, turn in enumerate(p)] for p in pipeline(waits)]
    monkeypatch.setattr(ring, "in_processes", lambda *_, **__: near)
    found = gpipe_claims.the_bubble_is_on_the_clock(lab)
    assert outcome in found.outcome
    assert found.numbers["idle by the closed form"] == [1 / 2, 1 / 3, 1 / 5, 1 / 9]


def replica(overlap):
    """Three layers of 2 seconds each and a wire of 1 a bucket, hidden or not."""
    ready, wire = [2.0, 4.0, 6.0], [1.0, 1.0, 1.0, 3.0]
    turns = [ddp_claims.Clocked(ready, wire, (7.0 if overlap else 9.0) + i / 1000, 9.0) for i in range(6)]
    return [turns, turns]


@pytest.mark.parametrize(("overlap", "outcome"), [(True, "supported"), (False, "opposite")])
def test_a_wire_that_is_not_hidden_is_seen(lab, monkeypatch, overlap, outcome):
    monkeypatch.setattr(ring, "in_processes", lambda *_, **__: replica(overlap))
    assert outcome in ddp_claims.the_clock_is_right(lab).outcome


@pytest.mark.parametrize(("paper", "claim"), [(gpipe, "the_bubble_is_on_the_clock"), (ddp, "the_clock_is_right")])
def test_a_process_that_fails_is_not_a_verdict(lab, monkeypatch, paper, claim):
    monkeypatch.setattr(ring, "in_processes", lambda *_, **__: [[], ValueError("gone")])
    with pytest.raises(ValueError, match="gone"):
        getattr(paper, claim)(lab)
