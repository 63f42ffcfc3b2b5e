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

from deltax.parts.distributed.replicas import flat

ROW = 4 << 20  # bytes of a process's row: what is larger is summed piece by piece
LINE = 8  # numbers of 8 bytes in a line of the cache: no two processes count in one
SPIN = 0.005  # seconds of waiting before a process sleeps between two looks


class SharedSum:
    """The sum of a tensor over two or more processes; each gives one of the same shape and dtype, in the same order.

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
            torch.add(rows[0], rows[1], out=piece)  # half the time of `sum`
            for row in rows[2:]:
                piece.add_(row)
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


class Reducer:
    """Gives every replica the mean of their losses and gradients, and the buffers of the first.

    The gradients are scaled so that their norm is at most `largest`, as by `clip_grad_norm_`. A parameter that the loss
    of none depends on keeps no gradient. Which parameters there are, and are trained, is asked once, at the start.
    """

    def __init__(self, model: nn.Module, shared: SharedSum, largest: float):
        self.model, self.shared, self.largest = model, shared, largest
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.weights]

    def __call__(self, loss: Tensor) -> tuple[float, Tensor]:
        """Once after each backward pass. Returns the mean loss, and the norm that the mean gradient had."""
        used = torch.tensor([p.grad is not None for p in self.weights], dtype=torch.float32)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        total = self.shared(flat([*own, used, loss]))
        *gradients, used, loss = total.split([*self.sizes, len(used), 1])
        mean = total[: sum(self.sizes)]
        norm = torch.linalg.vector_norm(mean) / len(self.shared.peers)
        mean.mul_((self.largest / (norm + 1e-6)).clamp(max=1) / len(self.shared.peers))
        for parameter, gradient, share in zip(self.weights, gradients, used.tolist(), strict=True):
            parameter.grad = _laid_as(parameter, gradient) if share else None
        self._take_first_buffers()
        return float(loss) / len(self.shared.peers), norm

    def _take_first_buffers(self) -> None:
        if not (held := list(self.model.buffers())):
            return
        raw = [b.contiguous().view(-1).view(torch.uint8) for b in held]
        firsts = self.shared(torch.cat(raw).mul_(self.shared.rank == 0)).split([len(r) for r in raw])
        for buffer, first in zip(held, firsts, strict=True):
            buffer.copy_(first.clone().view(buffer.dtype).view_as(buffer))


def _laid_as(parameter: Tensor, vector: Tensor) -> Tensor:
    """The vector's numbers in the parameter's shape, type and strides: fused optimizers read both alike."""
    tensor = vector.view_as(parameter)
    alike = parameter.is_contiguous() and parameter.dtype == vector.dtype
    return tensor if alike else torch.empty_like(parameter).copy_(tensor)


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
