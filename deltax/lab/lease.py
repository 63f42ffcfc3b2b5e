"""Who holds what: a process, and whether it still lives."""

import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SILENCE = 60.0  # seconds after which a worker that cannot be asked counts as dead


@dataclass(frozen=True)
class Worker:
    """A process that trains. `born` tells it from a later process of the same number."""

    host: str
    pid: int
    born: int

    @classmethod
    def here(cls, pid: int | None = None) -> "Worker":
        """A process of this machine, this one by default."""
        pid = pid or os.getpid()
        return cls(_host(), pid, _birth(pid) or 0)

    def alive(self, heartbeat: float) -> bool:
        """Asked of the system where it runs here, else believed for a minute after its last sign of life."""
        if self.host == _host():
            return _birth(self.pid) == self.born
        return time.time() - heartbeat < SILENCE


@cache
def _host() -> str:
    """A machine, and which of its containers: numbers of processes mean the same only inside one."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the machine did; 0 where only its life can be told, None
    when it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
