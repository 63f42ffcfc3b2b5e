"""Members of a ring: each passes on what it holds to the next, and goes on computing meanwhile.

A ring is processes of torch.distributed, threads of this process, which stand for them in claims and tests, or nobody
else at all. `here()` is the one this thread is in; `joined` says so.
"""

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed

from deltax.errors import UserError

Held = tuple[Tensor, ...]
Arrival = Callable[[], Held]


class BrokenRing(UserError):
    """A member died, stalls, or computes something else. What the ring was doing is lost, on every member."""


@runtime_checkable
class Ring(Protocol):
    """`rank` counts from 0 to `size` - 1; all members call the same methods in the same order."""

    rank: int
    size: int

    def pass_on(self, held: Held) -> Arrival:
        """Send tensors to the next member, and receive as many of the same shapes from the one before.

        Returns at once; what it returns waits for both and gives what arrived. The tensors must not change until then.
        """

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every member's numbers."""


class Alone:
    """The ring of one."""

    rank, size = 0, 1

    def pass_on(self, held: Held) -> Arrival:
        return lambda: held

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]


class Processes:
    """The processes of a torch.distributed group, the default one if none is named.

    processes  how many there must be; any number by default
    seconds    how long a neighbour may keep this one waiting; under NCCL the group's own timeout holds

    Raises UserError where there is no group, or one of another size. Methods raise BrokenRing for a neighbour that has
    died or stalls; the processes after it then find this one gone.
    """

    def __init__(self, group: Any = None, *, processes: int | None = None, seconds: float = 60.0):
        if not distributed.is_initialized():
            raise UserError("a ring of processes needs torch.distributed: start the run with torchrun")
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        if processes not in (None, self.size):
            raise UserError(
                f"a ring of {processes} processes was asked for, and {self.size} were started: start {processes}"
            )
        self.group, self.seconds, self._passed = group, seconds, 0

    def pass_on(self, held: Held) -> Arrival:
        if self.size == 1:
            return lambda: held
        sent = tuple(t.contiguous() for t in held)
        arriving = tuple(self._room(t) for t in sent)
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        operations = []
        for out, into in zip(sent, arriving, strict=True):
            self._passed += 1
            for op, tensor, peer in ((distributed.isend, out, after), (distributed.irecv, into, before)):
                operations.append(distributed.P2POp(op, tensor, group=self.group, tag=self._passed, group_peer=peer))
        with self._watched(before):
            works = distributed.batch_isend_irecv(operations)

        return partial(self._arrived, works, before, sent, arriving)

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        device = "cuda" if distributed.get_backend(self.group) == "nccl" else "cpu"
        ours = torch.tensor(numbers, device=device)
        found = [torch.empty_like(ours) for _ in range(self.size)]
        with self._watched(None):
            self._wait([distributed.all_gather(found, ours, group=self.group, async_op=True)])
        return [t.tolist() for t in found]

    def _arrived(self, works: Sequence[Any], before: int, sent: Held, arriving: Held) -> Held:
        """`sent` is only held: the transfer reads it until now."""
        with self._watched(before):
            self._wait(works)
        return arriving

    def _room(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            work.wait(timedelta(seconds=self.seconds))

    @contextmanager
    def _watched(self, before: int | None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            who = "the others" if before is None else f"process {before}"
            raise BrokenRing(
                f"process {self.rank} of {self.size} heard nothing from {who} for {self.seconds:g} s, or lost the "
                f"connection: a process died or stalls; see what it printed, and start all of them again"
            ) from error


class _Threads:
    """One of several threads that pass tensors on through queues."""

    def __init__(self, rank: int, wires: "list[queue.Queue[Held]]", together: threading.Barrier, board: list[Any]):
        self.rank, self.size = rank, len(wires)
        self._wires, self._together, self._board = wires, together, board

    def pass_on(self, held: Held) -> Arrival:
        self._wires[(self.rank + 1) % self.size].put(tuple(t.clone() for t in held))
        return lambda: self._wires[self.rank].get(timeout=30)

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        self._board[self.rank] = list(numbers)
        self._together.wait(30)
        found = list(self._board)
        self._together.wait(30)
        return found


def in_threads(size: int, call: Callable[[Ring], Any]) -> list[Any]:
    """call(ring) for each member of a ring of threads, and what they return. Raises what the first of them raised."""
    wires: list[queue.Queue[Held]] = [queue.Queue() for _ in range(size)]
    together, board = threading.Barrier(size), [None] * size
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def member(rank: int) -> None:
        try:
            ring = _Threads(rank, wires, together, board)
            with joined(ring):
                found[rank] = call(ring)
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def in_processes(size: int, call: Callable[..., Any], *args: Any, patience: float = 60.0) -> list[Any]:
    """call(ring, *args) in each of `size` new processes on this machine, joined by gloo, and what they return.

    `call` is a function of a module. Where one fails, its exception stands in place of what it returns; where one dies
    without a word, or is not done after `patience` seconds, a BrokenRing does.
    """
    with TemporaryDirectory() as folder:
        members = _started(range(size), size, f"{folder}/meet", call, args)
        end = time.monotonic() + patience
        found = [_heard(rank, pipe, end) for rank, (_, pipe) in enumerate(members)]
        for process, _ in members:
            process.join(max(0.0, min(5.0, end - time.monotonic())))
            process.kill()
    return found


def heard_of_all(size: int, call: Callable[..., Any], *args: Any, patience: float = 60.0) -> list[Any]:
    """`in_processes` where all return; raises what stands in place of the first that does not."""
    found = in_processes(size, call, *args, patience=patience)
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


def on_rank_0(size: int, call: Callable[..., Any], *args: Any) -> Any:
    """The same, but this process is the first of them: what its own call(ring, *args) returns."""
    with TemporaryDirectory() as folder:
        others = _started(range(1, size), size, f"{folder}/meet", call, args)
        try:
            with joined(meet(0, size, f"{folder}/meet")) as ring:
                return call(ring, *args)
        finally:
            distributed.destroy_process_group()
            for process, _ in others:
                process.join(5)
                process.kill()


def _started(ranks: Sequence[int], size: int, path: str, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """Processes that are members, each with the pipe on which it says what came of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, call.__module__])
    members = []
    for rank in ranks:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(rank, size, path, theirs, call, args), daemon=True)
        process.start()
        theirs.close()
        members.append((process, ours))
    return members


def meet(rank: int, size: int, path: str, **settings: Any) -> Processes:
    """Join `size` processes on this machine that meet at a file, over gloo."""
    patient = timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=patient)
    return Processes(**settings)


def _member(rank: int, size: int, path: str, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with joined(meet(rank, size, path)) as ring:
            pipe.send(call(ring, *args))
    except Exception as error:
        pipe.send(error)


def _heard(rank: int, pipe: Any, end: float) -> Any:
    try:
        return pipe.recv() if pipe.poll(max(0.0, end - time.monotonic())) else BrokenRing(f"process {rank} is not done")
    except EOFError:
        return BrokenRing(f"process {rank} died")


_HERE: ContextVar[Ring] = ContextVar("ring", default=Alone())  # noqa: B039


def here() -> Ring:
    """The ring that this thread is a member of."""
    return _HERE.get()


@contextmanager
def joined(ring: Ring) -> Iterator[Ring]:
    """Within, this thread is a member of the ring."""
    token = _HERE.set(ring)
    try:
        yield ring
    finally:
        _HERE.reset(token)


def shard(x: Tensor, ring: Ring, axis: int = 1) -> Tensor:
    """This member's positions of x: one run of as many as each other member has.

    Raises UserError where they do not divide.
    """
    length = x.shape[axis]
    if length % ring.size:
        near = length + -length % ring.size
        raise UserError(f"{length} positions do not divide over {ring.size} processes; pad the sequence to {near}")
    return x.chunk(ring.size, axis)[ring.rank]
