"""Sums over the processes of one machine, through memory that they share.

gloo sends what it sums through the network's stack and wakes a thread of its own for it, which costs a small model as
much time as its arithmetic. Here each process writes into its row of one block of memory, and each sums all rows.
"""

import mmap
import os
import platform
import select
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, distributed, nn

from deltax.parts.replicas import flat

ROW = 4 << 20  # bytes of a process's row: what is larger is summed piece by piece
LINE = 8  # numbers of 8 bytes in a line of the cache: no two processes count in one
SPIN = 0.005  # seconds of waiting before a process sleeps between two looks


class SharedSum:
    """The sum of a tensor over all processes; each gives one of the same shape and dtype, in the same order.

    memory    the shared block: a count for each process, then two rows for each
    peers     a pidfd of every process by rank
    patience  seconds that a process waits for the others
    """

    def __init__(self, memory: mmap.mmap, rank: int, peers: list[int], patience: float):
        world = len(peers)
        self.rank, self.peers, self.patience = rank, peers, patience
        self.counts = memoryview(memory).cast("q")
        rows = torch.frombuffer(memory, dtype=torch.uint8, offset=_head(world), count=2 * world * ROW)
        self.rows = rows.view(2, world, ROW)
        self.round = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous tensor in place. Every process gets the same bits.

        Raises DistNetworkError where another process ended, or did not come in time.
        """
        for piece in tensor.view(-1).split(ROW // tensor.element_size()):
            self.round += 1
            # Two sets of rows in turn: all have read the last but one before any counts the last.
            rows = self.rows[self.round % 2, :, : piece.numel() * piece.element_size()].view(piece.dtype)
            rows[self.rank].copy_(piece)
            self.counts[self.rank * LINE] = self.round
            for other in range(len(self.peers)):
                if self.counts[other * LINE] < self.round:
                    self._await(other)
            torch.sum(rows, 0, out=piece)
        return tensor

    def close(self) -> None:
        """Ask after the others no more; the memory goes with the last tensor of it."""
        for peer in self.peers:
            os.close(peer)

    def _await(self, other: int) -> None:
        began = time.monotonic()
        while self.counts[other * LINE] < self.round:
            waited = time.monotonic() - began
            if waited < SPIN:
                os.sched_yield()
                continue
            ended = select.select([self.peers[other]], [], [], min(waited / 10, 0.05))[0]
            if ended and self.counts[other * LINE] < self.round:  # not after its last sum
                raise distributed.DistNetworkError(f"rank {other} ended")
            if waited > self.patience:
                raise distributed.DistNetworkError(f"rank {other} was not heard of for {self.patience:g} s")


def shared_sum(patience: float) -> SharedSum | None:
    """For all processes of the default group, or None where they cannot share memory; each must ask.

    They can on one machine whose processor keeps stores in order (x86), with room in its shared memory.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    size = _head(world) + 2 * world * ROW
    together = os.environ.get("LOCAL_WORLD_SIZE") == str(world) and platform.machine() == "x86_64"
    with _reserved(size) if rank == 0 and together else nullcontext("") as path:
        told = _told_by_all((path, os.getpid()))
        found = _found(told[0][0], size, [pid for _, pid in told]) if together and told[0][0] else None
        all_found = all(_told_by_all(found is not None))
    return SharedSum(found[0], rank, found[1], patience) if found and all_found else None


def meet(model: nn.Module, shared: SharedSum, largest: float) -> Tensor:
    """Give every replica the mean of their gradients, and the buffers of the first.

    The mean is scaled so that its norm is at most `largest`, as by `clip_grad_norm_`. Returns the norm it had. A
    parameter that the loss of none depends on keeps no gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32)
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = shared(flat([*own, used])).div_(len(shared.peers))
    mean, used = total.split([len(total) - len(used), len(used)])
    norm = torch.linalg.vector_norm(mean)
    mean.mul_((largest / (norm + 1e-6)).clamp(max=1))
    pieces = mean.split([g.numel() for g in own])
    for parameter, gradient, piece, share in zip(trained, own, pieces, used.tolist(), strict=True):
        parameter.grad = gradient.copy_(piece.view_as(gradient)) if share else None
    if held := list(model.buffers()):
        raw = [b.contiguous().view(-1).view(torch.uint8) for b in held]
        firsts = shared(torch.cat(raw).mul_(shared.rank == 0)).split([len(r) for r in raw])
        for buffer, first in zip(held, firsts, strict=True):
            buffer.copy_(first.clone().view(buffer.dtype).view_as(buffer))
    return norm


def _head(world: int) -> int:
    """Bytes before the rows."""
    return -(-world * LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


@contextmanager
def _reserved(size: int) -> Iterator[str]:
    """Where others find a new file in shared memory, its pages already its own; empty where there is no room.

    The file has no name, so it goes with the last process that holds it, however that ends.
    """
    with ExitStack() as held:
        path = ""
        with suppress(OSError):
            file = held.enter_context(tempfile.TemporaryFile(dir="/dev/shm")).fileno()
            os.posix_fallocate(file, 0, size)
            path = f"/proc/{os.getpid()}/fd/{file}"
        yield path


def _found(path: str, size: int, pids: list[int]) -> tuple[mmap.mmap, list[int]] | None:
    """The memory, and a pidfd of each process."""
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), size), [os.pidfd_open(pid) for pid in pids]
    except (OSError, AttributeError):  # another container's; a Python that was built without pidfds
        return None


def _told_by_all(word: object) -> list:
    found: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, word)
    return found
