"""Peak memory as the operating system sees it, one fresh process a measurement."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def peak_memory(call: Callable[..., Any], *args: Any, warm: Sequence[Any]) -> int:
    """Bytes by which call(*args) raises the peak resident memory of a fresh process that has run call(*warm).

    `call` is a function of a module; arguments are what JSON holds. `warm` are small ones of the same kind, so that
    libraries and their buffers are loaded before the measurement. One thread. Linux only.
    """
    job = json.dumps([call.__module__, call.__qualname__, warm, args])
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-m", __name__, job], env=environment, stdout=subprocess.PIPE, check=True)
    return int(out.stdout.split()[-1])


def _measure(module: str, name: str, warm: list[Any], args: list[Any]) -> int:
    call = getattr(import_module(module), name)
    call(*warm)
    before = _peak()
    call(*args)
    return _peak() - before


def _peak() -> int:
    """VmHWM; not getrusage's ru_maxrss, which a process inherits from the one that started it."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
