"""Claims of deepspeed: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import claim
from deltax.papers.systems.parallelism.deepspeed import deepspeed, place


@claim
def on_the_host_it_steps_as_on_the_device():
    """On 1 to 3 ranks, 5 steps of AdamW on the host give, to the bit, the half-precision weights of AdamW on the
    device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = torch.randn(18, generator=torch.Generator().manual_seed(0))
    for ranks in (1, 2, 3):
        engine = deepspeed(start, ranks, _adamw, device=device)
        master = start.clone()
        beside = _adamw([master])
        weights = master.half()
        for _ in range(5):
            engine.step(lambda rank, w: _gradient(w))
            master.grad = sum([_gradient(weights).half() for _ in range(ranks)]).float() / ranks
            beside.step()
            weights = master.half()
        for each in engine.weights:
            assert torch.equal(each[:18].cpu(), weights)
        assert not torch.equal(weights, start.half())


@claim
def four_bytes_a_parameter_move():
    """On 1, 2 and 4 ranks, with AdamW and SGD, each rank moves 4 N / P bytes a step between device and host."""
    for ranks in (1, 2, 4):
        for optimizer in (_adamw, lambda parameters: torch.optim.SGD(parameters, lr=0.1)):
            engine = deepspeed(torch.randn(64), ranks, optimizer)
            for _ in range(3):
                engine.step(lambda rank, w: w)
            assert engine.moved == [3 * 4 * 64 // ranks] * ranks


@claim
def every_rank_has_one_place():
    """For three layouts, ranks map one to one to (stage, replica, shard), and shards of one tensor are neighbours."""
    for pipe, data, model in ((2, 3, 4), (4, 2, 1), (1, 1, 5)):
        places = [place(rank, pipe=pipe, data=data, model=model) for rank in range(pipe * data * model)]
        assert len(set(places)) == len(places)
        assert places == sorted(places) and places[-1] == (pipe - 1, data - 1, model - 1)
        assert all(places[r][:2] == places[r - r % model][:2] for r in range(len(places)))


def _adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)


def _gradient(weights: Tensor) -> Tensor:
    return weights.float() - weights.float().square() / 3
