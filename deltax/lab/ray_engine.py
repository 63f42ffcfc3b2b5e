"""Runs spread over a Ray cluster. Their results, checkpoints and weights all come back to the driver's own store."""

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import deltax
from deltax.errors import UserError
from deltax.lab.lease import Worker
from deltax.lab.store import Result, Store
from deltax.lab.worker import BEAT_EVERY, UNDER_WAY, Message, Tell, work
from deltax.train.job import Job
from deltax.whole import whole


@dataclass(frozen=True)
class Parcel:
    """What a run has on a node and the driver's store lacks: its checkpoint so far, or how it ended."""

    id: str
    checkpoint: bytes | None = None
    result: Result | None = None
    weights: bytes | None = None


class Cluster:
    """Ray tasks with a CPU each. A `Crew` whose claims are the driver's, and last as long as it does.

    Ray comes with the `ray` extra. A cluster already joined is used as it is, and must have this deltax; else the one
    that RAY_ADDRESS names is joined, or one started here, and given this deltax.
    """

    def __init__(self, store: Store, tell: Tell, keep_weights: bool):
        try:
            import ray
        except ImportError:
            raise UserError("the ray engine needs Ray: pip install 'deltax-ml[ray]'") from None
        self.ray, self.store, self.tell, self.keep_weights = ray, store, tell, keep_weights
        self.worker = Worker.here()
        self.streams: dict[Any, Job] = {}  # what each task says, as it says it

    def __enter__(self) -> "Cluster":
        self.ours = not self.ray.is_initialized()
        if self.ours:
            package = str(Path(deltax.__file__).parent)
            runtime = {"py_modules": [package], "env_vars": {"OMP_NUM_THREADS": "1"}}
            quiet = {"log_to_driver": False, "logging_level": logging.WARNING, "include_dashboard": False}
            self.ray.init(runtime_env=runtime, **quiet)
        self.room = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        self.beaten = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        for stream, job in self.streams.items():
            self.ray.cancel(stream, force=True)
            self.store.release(job, self.worker)
        if self.ours:
            self.ray.shutdown()

    def idle(self) -> Worker | None:
        return self.worker if len(self.streams) < self.room else None

    def start(self, worker: Worker, job: Job) -> None:
        path = self.store.checkpoint_of(job)
        files = {
            "checkpoint": path.read_bytes() if path.exists() else None,
            "start": self.store.start_of(job.start).read_bytes() if job.start else None,
        }
        task = self.ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(_train)
        self.streams[task.remote(job, job.id, files, self.keep_weights)] = job

    def poll(self, seconds: float) -> None:
        if time.monotonic() - self.beaten > BEAT_EVERY / 2:
            self.beaten = time.monotonic()
            for job in self.streams.values():
                self.store.beat(job, self.worker)
        if not self.streams:
            time.sleep(seconds)
            return
        for stream in self.ray.wait(list(self.streams), timeout=seconds)[0]:
            job = self.streams[stream]
            try:
                sent = self.ray.get(next(stream))
            except (self.ray.exceptions.RayError, StopIteration) as error:
                sent = Message("died", job.id, text=f"its Ray task ended with {type(error).__name__}")
            if isinstance(sent, Parcel):
                self._keep(sent)
                continue
            if sent.kind == "step":
                self.store.beat(job, self.worker, sent.step, sent.loss, sent.tokens_per_second)
            if sent.kind not in UNDER_WAY:
                del self.streams[stream]
                self.store.release(job, self.worker)
            self.tell(sent)

    def _keep(self, parcel: Parcel) -> None:
        if parcel.checkpoint:
            _write(self.store.checkpoints / f"{parcel.id}.safetensors", parcel.checkpoint)
        if parcel.weights:
            _write(self.store.weights / f"{parcel.id}.safetensors", parcel.weights)
        if parcel.result:
            self.store.put(parcel.result)


def _train(job: Job, id: str, files: dict[str, bytes | None], keep_weights: bool) -> Iterator[Message | Parcel]:
    """One run on a node, in a store of its own that is gone afterwards: all that the driver should know, in order."""
    if job.id != id:
        yield Message("failed", id, text="this node has another deltax, or other data, than the one that asked")
        return
    with tempfile.TemporaryDirectory() as folder:
        store, worker = Store(folder), Worker.here()
        path = store.checkpoint_of(job)
        for name, where in (("checkpoint", path), ("start", job.start and store.start_of(job.start))):
            if files[name]:
                _write(where, files[name])
        store.claim(job, worker)
        said: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=work, args=(job, store, worker, said.put, lambda: False, keep_weights)).start()
        known = files["checkpoint"]
        while (message := said.get()).kind in UNDER_WAY:
            yield message
            if message.kind == "step" and path.exists() and (now := path.read_bytes()) != known:
                known = now
                yield Parcel(id, checkpoint=now)
        result = store.get(job)
        if result:
            weights = result.weights_file.read_bytes() if result.weights_file else None
            yield Parcel(id, result=replace(result, weights_file=None), weights=weights)
        store.close()
        yield message


def _write(path: Path, content: bytes) -> None:
    with whole(path) as scratch:
        scratch.write_bytes(content)
