"""Claims of local-sgd: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.claims.checking import loss_on_batch
from deltax.papers.optimization.local_updates.local_sgd import LocalSteps
from deltax.parts.distributed.exchange import Exact, Ring, ring_bytes
from deltax.parts.distributed.replicas import flat
from deltax.parts.training import optimizers


@claim
def meeting_after_every_step_is_data_parallelism():
    """With H = 1 and SGD, the weights after each round are those of one SGD on the mean gradient of all workers, with
    its momentum too as long as the workers keep their velocities.
    """
    for momentum in (0.0, 0.9):
        local, together = _regression(), _regression()
        inner = part(optimizers.sgd, lr=0.3, momentum=momentum)
        ours = LocalSteps(local, inner=inner, workers=3, every=1)
        theirs = optimizers.sgd(together, lr=0.3, momentum=momentum)
        for step in range(10):
            theirs.zero_grad()
            for worker in range(3):
                loss_on_batch(local, 3 * step + worker).backward()
                ours.step()
                ours.zero_grad()
                (loss_on_batch(together, 3 * step + worker) / 3).backward()
            theirs.step()
            for p, q in zip(ours.shared, together.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert (local[0].weight - _regression()[0].weight).abs().max() > 0.1


@claim
def one_worker_is_sgd():
    """With one worker, the weights are SGD's to rounding, however rarely it meets itself."""
    alone, plain = _regression(), _regression()
    ours = LocalSteps(alone, inner=part(optimizers.sgd), workers=1, every=4)
    theirs = optimizers.sgd(plain)
    for step in range(9):
        for model, optimizer in ((alone, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss_on_batch(model, step).backward()
            optimizer.step()
    for p, q in zip(alone.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@claim
def a_round_ends_at_the_mean():
    """After a round, what is shared is the mean of the weights to which each worker came alone from where all began."""
    model = _regression()
    ours = LocalSteps(model, inner=part(optimizers.sgd), workers=3, every=5)
    ends = []
    for worker in range(3):
        alone = _regression()
        optimizer = optimizers.sgd(alone)
        for step in range(5):
            optimizer.zero_grad()
            loss_on_batch(alone, 3 * step + worker).backward()
            optimizer.step()
        ends.append(flat(list(alone.parameters())).detach())
    for turn in range(15):
        ours.zero_grad()
        loss_on_batch(model, turn).backward()
        ours.step()
    torch.testing.assert_close(flat(ours.shared).detach(), torch.stack(ends).mean(0), rtol=1e-12, atol=1e-12)
    assert (ends[0] - ends[1]).abs().max() > 0.01


@claim
def communication_falls_as_one_over_h():
    """T steps of P workers send 2 (P - 1) / P N numbers each T / H times, chunks rounded up; counted, not computed."""
    for workers, every in ((2, 1), (3, 4), (4, 12), (5, 6)):
        model = _regression()
        ours = LocalSteps(model, inner=part(optimizers.sgd), workers=workers, every=every)
        for turn in range(12 * workers):
            ours.zero_grad()
            loss_on_batch(model, turn).backward()
            ours.step()
        numbers = sum(p.numel() for p in model.parameters())
        assert ours.exchange.sent == 12 // every * ring_bytes(numbers, workers, width=8)
    assert ring_bytes(1000, 4) == 2 * 3 * 1000  # 2 (P - 1) / P of 4 bytes each


@claim
def a_ring_finds_the_mean():
    """The ring's mean is the mean, for any number of workers and lengths that do not divide among them."""
    torch.manual_seed(0)
    for workers in (1, 2, 3, 5):
        for length in (1, 4, 17):
            vectors = torch.randn(workers, length, dtype=torch.float64)
            mean = Ring(code=part(Exact)).among(dict(enumerate(vectors)))
            torch.testing.assert_close(mean, vectors.mean(0), rtol=1e-12, atol=1e-12)


@claim.measured(paper="10 to 100 times fewer rounds than synchronous SGD (abstract)")
def as_good_as_meeting_every_step(lab):
    """Under SGD, gpt with 4 workers that meet after every 10 of their steps ends within 0.05 bits per byte of meeting
    after every one, with a tenth of the communication.
    """
    ends = lambda every, seed: lab.train(lab.recipe(f"gpt+sgd+local-sgd(every={every})"), seed=seed).score
    return lab.at_most([ends(10, s) - ends(1, s) for s in lab.seeds(3)], 0.05, unit="bits per byte")


def _regression() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3)).double()
