"""Worker processes that come quickly: what they are forked from loads torch while the parent still reads its recipes.

Standard library only, so that a command can call it before anything else.
"""

import multiprocessing
import os
from multiprocessing import forkserver, process
from multiprocessing.context import ForkServerContext

from deltax.signals import ignoring_sigint

UNGUARDED = 71


def guard() -> None:
    """End this process if it is a worker that imports the script that started it, which would start it all again."""
    if process.current_process().__dict__.get("_inheriting"):
        os._exit(UNGUARDED)


def context() -> ForkServerContext:
    """Processes are forked from a server that has loaded torch and the trainer, once for all of them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["deltax.lab.processes", "torch._dynamo"])  # the second is what optimizers load
    return found


def up() -> None:
    """Start that server now; it loads beside its parent."""
    context()
    with ignoring_sigint():
        forkserver.ensure_running()
