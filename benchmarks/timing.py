"""Ratios from interleaved calls, so that a machine whose speed drifts slows both sides alike."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltax.train.machine import Machine

EVIDENCE = Path(__file__).parent.parent / "evidence"


def interleave(calls: dict[str, Callable[[], Any]], rounds: int = 15, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, round by round, in turns. Each timed call comes after an untimed one of its own, as in a
    run of one model: what the last call of another has left in caches and in the heap is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times faster ours is: the median over rounds of theirs / ours, and its middle half."""
    each = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return {"ratio": statistics.median(each), "low": low, "high": high, "ours_seconds": statistics.median(ours)}


def store(name: str, rows: dict[str, Any]) -> None:
    """Keep a benchmark's rows under `evidence/benchmarks/`, with the machine, the load and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "command": f"python -m benchmarks {name}",
        "commit": commit.stdout.strip(),
        "machine": Machine.here(threads=os.cpu_count() or 1).describe(),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    path = EVIDENCE / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for row, found in rows.items():
        print(f"{name:9} {row:55} {_said(found)}")


def _said(found: dict[str, Any]) -> str:
    words = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
    return ", ".join(words)
