"""Claims of gpipe: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.systems.parallelism.gpipe import Order, Work, all_forward_all_back, gpipe, timed
from deltax.parts.distributed.ring import Ring, heard_of_all


@claim
def the_gradient_is_that_of_the_batch():
    """For 1 to 5 stages and 2 to 12 micro-batches, loss and gradients equal the uncut model's on the whole batch, to
    1e-10.
    """
    for count, cut in ((1, 3), (2, 4), (4, 2), (5, 12)):
        stages, x, y = layers(count)
        expected = nn.functional.mse_loss(nn.Sequential(*stages)(x), y)
        whole = torch.autograd.grad(expected, list(stages.parameters()))
        loss = gpipe(stages, x.chunk(cut), against(y, cut))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close([p.grad for p in stages.parameters()], list(whole), rtol=1e-10, atol=1e-12)


@claim
def the_bubble_is_its_closed_form():
    """For K = 1 to 5 stages, the idle share is (K - 1) / (M + K - 1) (section 2.3), and below 0.2 for M >= 4 K."""
    for stages in range(1, 6):
        for pieces in (1, 2, 3, 8, 4 * stages):
            bubble = timed(all_forward_all_back(stages, pieces)).bubble
            assert abs(bubble - (stages - 1) / (pieces + stages - 1)) < 1e-12
            assert pieces < 4 * stages or bubble < 0.2


@claim
def a_stage_holds_every_piece():
    """With 4 stages and 7 micro-batches, each stage holds the inputs of all 7."""
    table = timed(all_forward_all_back(4, 7))
    assert [table.held(stage) for stage in range(4)] == [7] * 4


@claim
def statistics_over_a_batch_are_not_cut():
    """With batch norm, whose statistics are those of a micro-batch, the gradient differs from the batch's by over
    1e-3.
    """
    stages, x, y = layers(2)
    stages = nn.ModuleList([*stages, nn.BatchNorm1d(3).double()])
    whole = torch.autograd.grad(nn.functional.mse_loss(nn.Sequential(*stages)(x), y), stages[0][0].weight)[0]
    gpipe(stages, x.chunk(4), against(y, 4))
    assert (stages[0][0].weight.grad - whole).abs().max() > 1e-3


@claim.parity(peer="torch.distributed.pipelining.ScheduleGPipe")
def the_order_is_torch_s():
    """For three sizes, each stage's work has the order of torch's ScheduleGPipe."""
    from torch.distributed.pipelining import ScheduleGPipe

    assert all(all_forward_all_back(k, m) == orders(ScheduleGPipe, k, m) for k, m in ((2, 3), (3, 8), (4, 4)))


@claim.measured(paper="a bubble of (K - 1) / (M + K - 1), negligible when M >= 4 K (section 2.3)")
def the_bubble_is_on_the_clock(lab):
    """For M = 1, 2, 4 and 8 on two processes, torch's GPipe schedule idles (K - 1) / (M + K - 1) of the time, to within
    0.05.
    """
    cuts = (1, 2, 4, 8)
    both = heard_of_all(2, _worked, 1024, 512, cuts, 6, patience=100)
    idle = [[_idle(pair) for pair in zip(*turn, strict=True)] for turn in zip(*both, strict=True)]
    form = [1 / (pieces + 1) for pieces in cuts]
    off = [max(abs(found - said) for found, said in zip(turn, form, strict=True)) for turn in idle]
    seconds = [[max(took for _, took in pair) for pair in zip(*turn, strict=True)] for turn in zip(*both, strict=True)]
    numbers = {"pieces": cuts, "idle": idle, "idle by the closed form": form, "seconds": seconds}
    return lab.at_most(off, 0.05, unit="of the time, the furthest of four", numbers=numbers)


def _idle(pair: Sequence[tuple[float, float]]) -> float:
    """The share of the time until the last stage is done that stages are idle; each pair is (busy, until done)."""
    return 1 - sum(busy for busy, _ in pair) / (len(pair) * max(took for _, took in pair))


def _worked(ring: Ring, rows: int, width: int, cuts: Sequence[int], turns: int) -> list[list[tuple[float, float]]]:
    """For each turn after a warm-up and each cut: seconds this stage was busy, and seconds until done."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(ring.rank)
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())]
    x, y = torch.randn(2, rows, width)
    busy = [0.0]

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            began = perf_counter()
            out = work(*given, **more)
            busy[0] += perf_counter() - began
            return out

        return timed

    schedules = []
    for pieces in cuts:
        stage = PipelineStage(nn.Sequential(*layers), ring.rank, ring.size, torch.device("cpu"))
        for way in ("forward_one_chunk", "backward_one_chunk"):
            setattr(stage, way, watched(getattr(stage, way)))
        schedules.append(ScheduleGPipe(stage, pieces, loss_fn=nn.functional.mse_loss))

    def turn(schedule: ScheduleGPipe) -> tuple[float, float]:
        busy[0] = 0.0
        ring.gather([0])  # all begin together
        began = perf_counter()
        schedule.step(*([x] if ring.rank == 0 else []), **({"target": y} if ring.rank + 1 == ring.size else {}))
        return busy[0], perf_counter() - began

    return [[turn(schedule) for schedule in schedules] for _ in range(turns + 1)][1:]


def orders(schedule: type, stages: int, pieces: int) -> Order:
    """The order in which a torch.distributed.pipelining schedule runs the work of each stage."""
    from unittest.mock import MagicMock

    order = []
    for at in range(stages):
        place = {"stage_index": at, "num_stages": stages, "is_first": at == 0, "is_last": at == stages - 1}
        stage, row = MagicMock(device="cpu", **place), []
        for way, back in (("forward_one_chunk", False), ("backward_one_chunk", True)):
            getattr(stage, way).side_effect = lambda piece, *_, back=back, row=row, **__: row.append(Work(back, piece))
        for moves in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            getattr(stage, moves).return_value = []
        running = schedule(stage, pieces)
        running._initialize_stage = lambda *given, **more: None
        running._step_microbatches([()] * pieces, [{}] * pieces)
        order.append(row)
    return order


def against(y: Tensor, pieces: int) -> Callable[[int, Tensor], Tensor]:
    """The mean squared distance of a piece's output from its share of y."""
    targets = y.chunk(pieces)
    return lambda piece, out: nn.functional.mse_loss(out, targets[piece])


def layers(count: int) -> tuple[nn.ModuleList, Tensor, Tensor]:
    """Stages of a small tanh network in float64, inputs (12, 3) and targets (12, 3)."""
    torch.manual_seed(0)
    stages = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(count)).double()
    return stages, *torch.randn(2, 12, 3, dtype=torch.float64)
