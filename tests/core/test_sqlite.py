"""Processes that open one new file at the same moment all get in."""

import importlib
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

KINDS = {"library": "Library", "lab": "Store"}

_OPENS = """
import sys
from pathlib import Path
{imports}
for line in sys.stdin:
    print({opens}(Path(line.strip())).close() or "open", flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_file_opens_for_all(kind, tmp_path):
    name = KINDS[kind]
    code = _OPENS.format(imports=f"from deltax.{kind}.store import {name}", opens=name)
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    processes = [start(), start()]
    try:
        for round in range(40):
            for process in processes:
                process.stdin.write(f"{tmp_path / str(round)}\n")
                process.stdin.flush()
            said = [process.stdout.readline().strip() for process in processes]
            assert said == ["open", "open"], [p.stderr.read() for p, s in zip(processes, said, strict=True) if not s]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_another_process_is_making_is_waited_for(kind, tmp_path):
    """SQLite answers the change to WAL with "database is locked" at once while another writes, whatever the timeout."""
    kind_of_store = getattr(importlib.import_module(f"deltax.{kind}.store"), KINDS[kind])
    path = tmp_path / "store"
    kind_of_store(path).close()
    [file] = [path] if path.is_file() else path.glob("*.sqlite*")
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    assert other.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    other.execute("BEGIN IMMEDIATE")

    def let_go():
        time.sleep(0.2)
        other.execute("COMMIT")
        other.close()

    thread = threading.Thread(target=let_go)
    thread.start()
    kind_of_store(path).close()
    thread.join()
