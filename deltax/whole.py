"""Files that are whole or not there, whenever the process dies and however full the disk is."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch file to write, which becomes `path` at the end; where anything is raised it is removed and `path` is
    as it was. The folder is made where it is missing. Raises what opening, writing and renaming raise.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
