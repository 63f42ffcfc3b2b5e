"""Claims of ddp: the paper's equations, parity with peers, and what it measures."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from deltax import claim
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.parallelism.ddp import Arrival, buckets, ddp
from deltax.parts.distributed.ranks import Ranks, flat
from deltax.parts.distributed.ring import Ring, heard_of_all
from deltax.parts.training.objectives import next_token
from deltax.tasks.language.text import Batch


@claim
def many_workers_are_one():
    """After 5 steps, 4 workers with equal shares of a batch have the weights of one worker with all of it, to 1e-10."""
    batch = _batch(8)
    one, model = _trained([batch]), _trained(batch.pieces(4))
    torch.testing.assert_close(model, one, rtol=1e-10, atol=1e-12)


@claim
def unequal_shares_are_another_gradient():
    """With shares of 6 and 2 examples, averaging the workers' gradients gives other weights, by over 1e-4."""
    batch = _batch(8)
    shares = [Batch(*(t[:6] for t in batch)), Batch(*(t[6:] for t in batch))]
    assert (_trained(shares) - _trained([batch])).abs().max() > 1e-4


@claim
def buckets_change_when_and_not_what():
    """On 2, 3 and 5 ranks, averages equal the mean to 1e-12 for any bucket size. Each rank sends 2 (P - 1) / P of the
    gradient.
    """
    torch.manual_seed(0)
    for size in (2, 3, 5):
        gradients = [[torch.randn(n, 30, dtype=torch.float64) for n in (1, 2, 7, 4)] for _ in range(size)]
        mean = [torch.stack(each).mean(0) for each in zip(*gradients)]
        for limit in (1, 1000, 10**6):
            ring = Ranks(size)
            for rank in ddp(gradients, ring, bucket=limit):
                torch.testing.assert_close(rank, mean, rtol=1e-12, atol=1e-12)
            assert ring.sent == [2 * (size - 1) * 14 * 30 // size] * size
            assert ring.calls["all_reduce"] == len(buckets(gradients[0], limit))


@claim
def the_wire_hides_behind_the_backward_pass():
    """Where each bucket is sent in less time than the next is computed, total time is computing plus the last
    bucket.
    """
    compute, wire = [3.0, 2.0, 4.0, 1.5], [1.0, 1.5, 1.2, 0.7]
    assert finish(compute, wire) == sum(compute) + wire[-1]
    assert finish([sum(compute)], [sum(wire)]) == sum(compute) + sum(wire)
    slow = [5 * w for w in wire]
    assert compute[0] + sum(slow) <= finish(compute, slow) < sum(compute) + sum(slow)


@claim.parity(peer="torch.distributed, the bucket assignment of DistributedDataParallel")
def buckets_are_torch_s():
    """For 40 random tensors and three limits, buckets equal those of torch's DistributedDataParallel."""
    from torch.distributed import _compute_bucket_assignment_by_size as assign

    torch.manual_seed(0)
    for limit in (100, 4000, 10**6):
        tensors = [torch.empty(int(n)) for n in torch.randint(1, 900, (40,))]
        assert buckets(tensors, limit) == assign(tensors, [limit])[0]


@claim.measured(paper="near-linear scaling to 256 GPUs (abstract)")
def the_clock_is_right(lab):
    """Over two processes and a wire of 1 Gbit/s, torch DDP's backward pass takes the time that `finish` predicts, to
    within a tenth, with eight buckets and with one.

    `finish` is given the computing and the wire, each timed without the other. Gloo sums a bucket; the time that its
    bytes would travel is slept, since processes of one machine have no wire.
    """
    both = heard_of_all(2, _clocked, 8, 768, 125e6, 7, patience=100)
    turns = [_forecasts(pair) for pair in zip(*both, strict=True)]
    off = [max(abs(taken / said - 1) for said, taken in turn.values()) for turn in turns]
    numbers = {f"{name}: seconds said, seconds taken": [turn[name] for turn in turns] for name in turns[0]}
    return lab.at_most(off, 0.1, unit="of the forecast", numbers=numbers)


def finish(compute: Sequence[float], wire: Sequence[float]) -> float:
    """When the last bucket arrives: bucket i is ready after compute[0..i], and the wire carries one at a time."""
    ready = sent = 0.0
    for working, travelling in zip(compute, wire, strict=True):
        ready += working
        sent = max(ready, sent) + travelling
    return sent


class Clocked(NamedTuple):
    """Seconds of one turn on one process.

    ready      when each bucket was, with one a layer and nothing sent
    wire       of each of these buckets, then of one for all, with nothing computed
    many, one  of a backward pass with a bucket a layer, and with one for all
    """

    ready: list[float]
    wire: list[float]
    many: float
    one: float


def _forecasts(pair: Sequence[Clocked]) -> dict[str, tuple[float, float]]:
    """Seconds predicted by `finish`, and seconds taken. Joint work takes as long as on the slower process."""
    slower = lambda *values: [max(each) for each in zip(*values, strict=True)]
    ready, wire = slower(*(p.ready for p in pair)), slower(*(p.wire for p in pair))
    many, one = slower(*((p.many, p.one) for p in pair))
    compute = [after - before for before, after in pairwise([0.0, *ready])]
    return {"a bucket a layer": (finish(compute, wire[:-1]), many), "one bucket": (finish(ready[-1:], wire[-1:]), one)}


def _clocked(ring: Ring, layers: int, width: int, rate: float, turns: int) -> list[Clocked]:
    """The turns of this process, after one to warm up, over a wire of `rate` bytes a second."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)))
    x, cap = torch.randn(width, width), 4 * width**2 / 2**20
    asked: list[float] = []

    def unsent(_: Any, bucket: distributed.GradBucket) -> Arrival:
        asked.append(time.perf_counter())
        return _known(bucket.buffer())

    def replica(hook: Callable[..., Any], megabytes: float) -> nn.Module:
        made = nn.parallel.DistributedDataParallel(deepcopy(model), bucket_cap_mb=megabytes)
        made.register_comm_hook(None, hook)
        return made

    def span(call: Callable[[], Any]) -> tuple[float, float]:
        ring.gather([0])  # all begin together
        began = time.perf_counter()
        call()
        return began, time.perf_counter() - began

    found = []
    with ThreadPoolExecutor(1) as thread:

        def wire(_: Any, bucket: distributed.GradBucket) -> Arrival:
            return _sent(thread, rate, bucket.buffer())

        free, many, one = replica(unsent, cap), replica(wire, cap), replica(wire, 2 * layers * cap)
        backward = lambda engine: span(engine(x).square().mean().backward)
        for _ in range(turns + 1):
            asked.clear()
            began, _ = backward(free)
            alone = [span(lambda n=n: _travel(torch.ones(n * width**2), rate))[1] for n in [1] * layers + [layers]]
            found.append(Clocked([at - began for at in asked], alone, backward(many)[1], backward(one)[1]))
    return found[1:]


def _sent(thread: ThreadPoolExecutor, rate: float, bucket: Tensor) -> Arrival:
    """Buckets travel one after the other, in the thread, while the backward pass goes on."""
    arrived: Arrival = torch.futures.Future()

    def travel() -> None:
        try:
            arrived.set_result(_travel(bucket, rate))
        except RuntimeError as error:
            arrived.set_exception(error)

    thread.submit(travel)
    return arrived


def _known(value: Tensor) -> Arrival:
    arrived: Arrival = torch.futures.Future()
    arrived.set_result(value)
    return arrived


def _travel(bucket: Tensor, rate: float) -> Tensor:
    """Its mean over the processes, after as long as a wire of `rate` bytes a second would take."""
    distributed.all_reduce(bucket)
    time.sleep(bucket.numel() * bucket.element_size() / rate)
    return bucket / distributed.get_world_size()


def _batch(size: int) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(0, 11, (size, 10))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def _trained(shares: Sequence[Batch], steps: int = 5) -> Tensor:
    """The weights of a small gpt after some steps of descent with momentum, one share a worker."""
    torch.manual_seed(0)
    model = gpt.put("model.dim", 6).put("model.stack.depth", 1)().build({"vocab": 11, "context": 9}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    ring = Ranks(len(shares))
    for _ in range(steps):
        gradients = [torch.autograd.grad(next_token(model, share).mean(), parameters) for share in shares]
        for parameter, gradient in zip(parameters, ddp(gradients, ring, bucket=500)[0]):
            parameter.grad = gradient
        optimizer.step()
    return flat(parameters).detach()
