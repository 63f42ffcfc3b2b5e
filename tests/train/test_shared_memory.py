"""Sums in memory that processes share: the same bits on all, of any size and kind, or none where they cannot share."""

import os
import resource
import time

import numpy as np
import pytest
import torch
from torch import distributed, nn

from deltax.train import shared_memory
from deltax.train.launch import launch
from deltax.train.mesh import Mesh
from deltax.train.shared_memory import ROW, Reducer, shared_sum

KINDS = [((), torch.float32), ((7, 3), torch.float64), ((ROW // 4 * 2 + 5,), torch.float32), ((0,), torch.int64)]


def _given(rank):
    seeded = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=seeded).to(kind) for shape, kind in KINDS]


def _sums(rounds):
    shared = shared_sum(30)
    for i in range(rounds):  # one process always comes last, another one each time
        if i % 3 == shared.rank:
            time.sleep(0.02)
        assert shared(torch.tensor(i + shared.rank)) == 3 * i + 3
    return _sent([shared(x.clone()) for x in _given(shared.rank)])


def _sent(tensors):
    """As arrays: a tensor would be gone with the process that sends it."""
    return [None if t is None else t.detach().numpy() for t in tensors]


def test_a_sum_has_the_same_bits_on_every_process():
    found = launch(3, _sums, 12, patience=60)
    wanted = [torch.stack(each).sum(0) for each in zip(*map(_given, range(3)), strict=True)]
    for sums in found:
        for ours, first, true in zip(sums, found[0], wanted, strict=True):
            assert ours.tobytes() == first.tobytes()
            torch.testing.assert_close(torch.from_numpy(ours), true)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.apart, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.turned = nn.Parameter(torch.ones(2, 3).mT)
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("last", torch.zeros(2, 3).mT)

    def forward(self, x, rank):
        self.last.fill_(rank)
        self.flags.fill_(bool(rank))
        loss = self.norm(x).square().mean() + (x @ self.turned).square().sum() + self.norm.weight.dot(x.mean(0))
        return loss + self.wide.square().sum() * x.mean() + (self.apart.sum() if rank else 0)


def _meets():
    """Gradients and buffers before, and after; the norm of the gradients before they were clipped."""
    shared, model = shared_sum(30), _Model()
    world = distributed.get_world_size()
    x = torch.randn(world, 5, 3, generator=torch.Generator().manual_seed(0))
    model(x[shared.rank], shared.rank).backward()
    gradients = lambda: _sent(p.grad if p.grad is None else p.grad.clone() for p in model.parameters())
    buffers = lambda: _sent(b.clone() for b in model.buffers())
    before = gradients(), buffers()
    loss, norm = Reducer(model, shared, 0.5)(torch.tensor(3.0 + shared.rank))
    assert loss == 3 + (world - 1) / 2
    assert [p.grad.dtype for p in model.parameters() if p.grad is not None].count(torch.float64) == 1
    assert model.turned.grad.stride() == model.turned.stride() != (2, 1)
    return before, gradients(), buffers(), float(norm)


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_meet_at_the_mean_gradient_and_the_first_ones_buffers(world):
    found = launch(world, _meets, patience=60)
    before, first = ([each[0][kind] for each in found] for kind in (0, 1))
    assert all(any((a != b).any() for a, b in zip(first[0], other, strict=True)) for other in first[1:])
    given = [[g for g in gradients if g is not None] for gradients in zip(*before, strict=True)]
    means = [sum(each) / world if each else None for each in given]
    assert sum(m is None for m in means) == 1
    true_norm = np.sqrt(sum(np.square(m).sum() for m in means if m is not None))
    for _, gradients, buffers, norm in found:
        assert norm == pytest.approx(true_norm, rel=1e-5) and norm > 0.5
        for mean, gradient in zip(means, gradients, strict=True):
            if mean is None:
                assert gradient is None
            else:
                np.testing.assert_allclose(gradient, mean * 0.5 / true_norm, rtol=1e-5)
        for buffer, true in zip(buffers, first[0], strict=True):
            assert buffer.dtype == true.dtype and np.array_equal(buffer, true)


def _without_room(how):
    if how == "full" and distributed.get_rank() == 0:
        shared_memory.ROW = 1 << 50
    if how == "apart":
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    if how == "other container" and distributed.get_rank() == 1:
        shared_memory._found = lambda *_: None
    return shared_sum(30)


def test_where_memory_cannot_be_shared_all_know():
    for how in ("full", "apart", "other container"):
        assert launch(2, _without_room, how, layout=Mesh(fsdp=2), patience=60) == [None, None]


def _faults():
    """Pages that came in five turns, after four more, of three tensors of 20 MiB that end together.

    By itself glibc keeps one such block, and gives back three, each turn.
    """
    for i in range(9):
        if i == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.zeros(5 << 20) for _ in range(3)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_process_that_trains_keeps_its_memory():
    (faults,) = launch(1, _faults, patience=60)
    assert faults < (20 << 20) / 4096
