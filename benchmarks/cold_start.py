"""How long a user waits: the catalogue's commands from a cold process, and a comparison until its first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing
from deltax.lab.store import Store

LIMIT = {"dx list": 0.3, "dx show dyt": 0.3, "dx compare, until the first step": 8.0}


def main() -> None:
    dx = [sys.executable, "-m", "deltax"]
    seconds = {
        "dx list": [_run([*dx, "list"]) for _ in range(9)],
        "dx show dyt": [_run([*dx, "show", "dyt"]) for _ in range(9)],
        "dx compare, until the first step": [_first_step([*dx, "compare", "gpt", "gpt+dyt"]) for _ in range(3)],
    }
    rows = {name: {"seconds": statistics.median(s), "limit": LIMIT[name]} for name, s in seconds.items()}
    timing.store("cold_start", rows)


def _run(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _first_step(command: list[str]) -> float:
    """Until a run of a fresh store tells its first step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:  # workers may still be saving
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, "DELTAX_HOME": home, "PYTHONPATH": str(Path.cwd())},
            cwd=home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                if (Path(home) / "runs" / "runs.sqlite").exists() and any(r.step for r in Store(f"{home}/runs").runs()):
                    return time.perf_counter() - start
            raise RuntimeError("the comparison ended before its first step")
        finally:
            process.terminate()
            process.wait()
