"""Several processes on this machine that work as one group, where torchrun has not started them.

They are forked from a server that has imported torch once, so a group of four starts in the time of one.
"""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

import torch
from torch.distributed import TCPStore

from deltax.errors import UserError
from deltax.signals import ignoring_sigint
from deltax.train import mesh
from deltax.train.machine import core_each, settle

_PRELOADED = ["deltax.train.loop", "deltax.train.tensor_parallel", "torch.distributed.fsdp", "torch._dynamo"]


_parent: connection.Connection | None = None


def launch(
    size: int,
    work: Callable[..., Any],
    *args: Any,
    layout: mesh.Mesh | None = None,
    patience: float = mesh.PATIENCE,
    hear: Callable[[Any], Any] = lambda told: None,
) -> list[Any]:
    """What `work(*args)` returns on each of `size` processes joined in one group, by rank.

    `work` is a module's function; it and what it is given and returns are pickled. Without a GPU the group is gloo's.
    `hear` is called here with all that the processes `tell`, while they work.

    Where one process fails, dies or stalls, the others learn of it within `patience` seconds, and all have ended within
    a minute more. Raises UserError: with the sentence of a process that knows the mistake, else saying which process
    was lost, and with what each of the others said as a note.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=patience))
    pipes, processes = [], []
    try:
        for rank, core in enumerate([None] * size if torch.cuda.is_available() else core_each(size)):
            ours, theirs = context.Pipe()
            job = (rank, size, core, store.port, theirs, patience, layout, work, args)
            process = context.Process(target=_process, args=job, daemon=True)
            with ignoring_sigint():
                process.start()
                processes.append(process)
            theirs.close()
            pipes.append(ours)
        said = _listen(pipes, hear, grace=min(patience, 60) + 2)
        ends = {rank: _end(processes[rank]) for rank in range(size) if rank not in said}
    finally:
        for process in processes:
            process.kill()
            process.join()
    return _results(said, ends, size)


def tell(word: Any) -> None:
    """Say something to the `hear` of the `launch` that started this process; elsewhere nobody hears it."""
    if _parent is not None:
        _parent.send(("told", word))


def _listen(pipes: list[connection.Connection], hear: Callable[[Any], Any], grace: float) -> dict[int, tuple[str, Any]]:
    """What each process said last, or nothing where it died; once one fails the others have `grace` seconds."""
    said: dict[int, tuple[str, Any]] = {}
    waiting = dict(zip(pipes, range(len(pipes))))
    deadline = None
    while waiting and (deadline is None or time.monotonic() < deadline):
        for pipe in connection.wait(list(waiting), timeout=0.5):
            what, value = "died", None
            with contextlib.suppress(EOFError, ConnectionResetError):
                what, value = pipe.recv()
            if what == "told":
                hear(value)
                continue
            rank = waiting.pop(pipe)
            if what != "died":
                said[rank] = what, value
            if deadline is None and what != "returned":
                deadline = time.monotonic() + grace
    return said


def _results(said: dict[int, tuple[str, Any]], ends: dict[int, str], size: int) -> list[Any]:
    for rank, (what, value) in said.items():
        if what == "broke":
            raise RuntimeError(f"on rank {rank}:\n{value}")
    if mistakes := [value for what, value in said.values() if what == "mistake"]:
        raise UserError(mistakes[0])
    lost = ", ".join(f"rank {rank} ({how})" for rank, how in ends.items()) or "a process"
    sentences = [value for what, value in said.values() if what == "lost"]
    if ends or sentences:
        error = UserError(f"lost {lost} of {size}; start again to go on from the last checkpoint")
        for sentence in sentences:
            error.add_note(sentence)
        raise error
    return [said[rank][1] for rank in range(size)]


def _end(process: Any) -> str:
    process.join(1)
    code = process.exitcode
    return "stalled" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end_with_parent(pipe: connection.Connection) -> None:
    """Nothing is ever sent this way: the pipe ends when the process that started this one does."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(2)


def _process(
    rank: int,
    size: int,
    core: int | None,
    port: int,
    pipe: connection.Connection,
    patience: float,
    layout: mesh.Mesh | None,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    global _parent
    _parent = pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    settle(core)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with mesh.joined(layout, patience=patience):
            value = work(*args)
        pipe.send(("returned", value))
        return
    except mesh.Lost as error:
        found = ("lost", str(error))
    except UserError as error:
        found = ("mistake", str(error))
    except Exception:
        found = ("broke", traceback.format_exc())
    pipe.send(found)
    os._exit(2)  # no goodbye to a group that has lost a member: it could wait
