"""INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning, section on SHARDCAST.
Prime Intellect Team, Jaghouar, Mattern, Ong, Straube, Basra, Pazdera, Thaman, Di Ferrante, Gabriel, Obeid, Erdem,
Keiblinger, Hagemann, 2025. arXiv:2505.07291

A checkpoint from one server to many, but in shards through a tree of relays: a relay hands out a shard while it fetches
the next, and a client draws a relay for each shard by how much it may expect of it.

The origin sends each checkpoint once to each relay below it, however many clients there are. A client expects of a
relay its chance to answer times its bandwidth, both moving averages, and draws in proportion, so that clients do not
all run to the fastest; some of the draws go to any relay, so that one that failed is tried again. The paper compares a
SHA-256 of the whole file and waits for the next version where it differs; here the origin publishes a digest of every
shard too, and a shard that is wrong is fetched again from another relay. Servers here are HTTP on loopback only.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deltax import UserError, paper
from deltax.errors import StoreError

PATIENCE = 10.0  # seconds


class Manifest(NamedTuple):
    """What a checkpoint is: bytes and SHA-256 of its shards, in order, and SHA-256 of the whole."""

    sizes: tuple[int, ...]
    shards: tuple[str, ...]
    whole: str


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cut(checkpoint: bytes, shards: int) -> list[bytes]:
    """The checkpoint in pieces whose sizes differ by one byte at most. Raises UserError for fewer bytes than shards."""
    if not 1 <= shards <= len(checkpoint):
        raise UserError(f"{len(checkpoint)} bytes cannot be cut into {shards} shards: choose 1 to {len(checkpoint)}")
    ends = [len(checkpoint) * i // shards for i in range(shards + 1)]
    return [checkpoint[a:b] for a, b in pairwise(ends)]


def manifest(shards: Sequence[bytes]) -> Manifest:
    return Manifest(tuple(map(len, shards)), tuple(map(digest, shards)), digest(b"".join(shards)))


def keep(checkpoint: bytes, path: Path) -> None:
    """Write at once: under this name the file is whole or not there, whenever the process dies.

    Raises StoreError when it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        scratch.write_bytes(checkpoint)
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from None


class Http(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class Server:
    """Hands out shards at http://127.0.0.1:PORT/INDEX; 404 for one that it does not have yet.

    `sent` counts the bytes of shards sent. Use as a context: it is closed at the end.
    """

    def __init__(self, shards: Sequence[bytes] = ()):
        self.shards: dict[int, bytes] = dict(enumerate(shards))
        self.sent = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = PATIENCE  # with a client that neither asks nor reads

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        index = request.path.strip("/")
        shard = self.shards.get(int(index)) if index.isdecimal() and len(index) < 10 else None
        if shard is None:
            request.send_error(404)
            return
        with self._lock:
            self.sent += len(shard)
        request.send_response(200)
        request.send_header("Content-Length", str(len(shard)))
        request.end_headers()
        request.wfile.write(shard)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Relay(Server):
    """Fetches the shards of `known` from its parent in order, and hands out each as soon as it is there and right.

    It gives up where its parent has not given the next right shard for `patience` seconds, or when it is closed.
    """

    def __init__(self, parent: str, known: Manifest, *, patience: float = PATIENCE):
        super().__init__()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(parent, known, patience), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has all shards, or has given up."""
        self._thread.join()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _fill(self, parent: str, known: Manifest, patience: float) -> None:
        for index in range(len(known.shards)):
            deadline = time.monotonic() + patience
            while (shard := fetch(parent, index, known, patience / 2)) is None:
                if self._closed.wait(0.005) or time.monotonic() > deadline:
                    return
            self.shards[index] = shard


def fetch(url: str, index: int, known: Manifest, patience: float = PATIENCE) -> bytes | None:
    """The shard; None where the server has none or a wrong one, or has not sent all of it within `patience` seconds.

    No more is read than a shard has bytes, and no redirection or proxy followed.
    """
    link, size = HTTPConnection(urlsplit(url).netloc, timeout=patience), known.sizes[index]
    shard = b""
    try:
        link.connect()
        hurry = threading.Timer(patience, _hang_up, (link.sock,))
        hurry.start()
        try:
            link.request("GET", f"/{index}")
            answer = link.getresponse()
            if answer.status == 200:
                shard = answer.read(size)
        finally:
            hurry.cancel()
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        link.close()
    return shard if digest(shard) == known.shards[index] else None


def _hang_up(line: socket.socket) -> None:
    """Who waits on it, for however few bytes at a time, is woken."""
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


class Choice:
    """Which relay to ask: by chance, in proportion to the expected rate, its chance to answer times its bandwidth.

    weight   of the newest observation in both moving averages
    explore  the share of draws that go to any relay alike
    Until a relay has answered, its bandwidth counts as the best of the others'.
    """

    def __init__(self, relays: int, *, weight: float = 0.3, explore: float = 0.1, seed: int = 0):
        if relays < 1:
            raise UserError("a client needs at least one relay to ask")
        self.success = [1.0] * relays
        self.bandwidth: list[float | None] = [None] * relays
        self.weight, self.explore, self._random = weight, explore, Random(seed)

    def chances(self) -> list[float]:
        """The probability of each relay."""
        best = max((b for b in self.bandwidth if b is not None), default=1.0)
        rates = [s * (best if b is None else b) for s, b in zip(self.success, self.bandwidth, strict=True)]
        n, total = len(rates), sum(rates)
        return [self.explore / n + (1 - self.explore) * (r / total if total else 1 / n) for r in rates]

    def draw(self, but: Collection[int] = ()) -> int:
        """A relay that is not among these. Raises UserError where all are."""
        left = [relay for relay in range(len(self.success)) if relay not in but]
        if not left:
            raise UserError(f"none of {len(self.success)} relays is left to draw")
        chances = self.chances()
        return self._random.choices(left, [chances[relay] or 1e-300 for relay in left])[0]

    def learn(self, relay: int, bandwidth: float | None) -> None:
        """What a request came to: bytes a second, or None where it failed."""
        old, w = self.bandwidth[relay], self.weight
        self.success[relay] += w * ((bandwidth is not None) - self.success[relay])
        if bandwidth is not None:
            self.bandwidth[relay] = bandwidth if old is None else old + w * (bandwidth - old)


@paper(year=2025, arxiv="2505.07291")
def shardcast(
    relays: Sequence[str], known: Manifest, *, choice: Choice | None = None, patience: float = PATIENCE
) -> bytes:
    """The checkpoint, shard by shard from the relays at these addresses, checked against what the origin published.

    A relay that fails, or whose shard is wrong, is learnt from, and the others asked before it is asked again; each
    has patience / (2 relays) seconds to send a shard, so that none of them can stall a client. Raises UserError where
    no relay has given the next right shard for `patience` seconds.
    """
    choice, shards, each = choice or Choice(len(relays)), [], patience / (2 * max(1, len(relays)))
    for index in range(len(known.shards)):
        deadline, failed, shard = time.monotonic() + patience, set[int](), None
        while shard is None:
            if time.monotonic() > deadline:
                raise UserError(f"no relay gave shard {index} within {patience} s: start a relay, or wait longer")
            if len(failed) == len(relays):
                failed.clear()
                time.sleep(0.005)
            relay, began = choice.draw(failed), time.perf_counter()
            shard = fetch(relays[relay], index, known, each)
            failed.add(relay)
            choice.learn(relay, None if shard is None else len(shard) / (time.perf_counter() - began))
        shards.append(shard)
    whole = b"".join(shards)
    if digest(whole) != known.whole:
        raise UserError("all shards are right and the checkpoint is not: its manifest is wrong, wait for the next")
    return whole


def transfer_time(size: float, bandwidth: float, *, shards: int, hops: int) -> Fraction:
    """Seconds until the last byte is over the last hop, when a shard goes on as soon as all of it is there:
    (S + h - 1) size / (S bandwidth)."""
    return (shards + hops - 1) * Fraction(size) / (shards * Fraction(bandwidth))


def simulate(size: float, bandwidth: Sequence[float], *, shards: int) -> Fraction:
    """The same by events: each hop, of its own bandwidth, sends one shard at a time, in order, once it has it."""
    there = [Fraction(0)] * shards
    for rate in bandwidth:
        free = Fraction(0)
        for i, since in enumerate(there):
            free = max(free, since) + Fraction(size) / shards / Fraction(rate)
            there[i] = free
    return there[-1]


def contention(clients: Sequence[Choice], bandwidth: Sequence[float], *, shards: int) -> float:
    """Seconds until all clients have all shards of size 1, when requests share a relay's bandwidth alike."""
    left = [shards] * len(clients)
    now, running = 0.0, {c: (choice.draw(), 1.0, 0.0) for c, choice in enumerate(clients)}
    while running:
        load = [sum(relay == r for relay, _, _ in running.values()) for r in range(len(bandwidth))]
        step = min(rest * load[relay] / bandwidth[relay] for relay, rest, _ in running.values())
        now += step
        for c, (relay, rest, began) in list(running.items()):
            rest -= step * bandwidth[relay] / load[relay]
            running[c] = (relay, rest, began)
            if rest < 1e-9:
                clients[c].learn(relay, 1 / (now - began))
                left[c] -= 1
                running[c] = (clients[c].draw(), 1.0, now)
                if not left[c]:
                    del running[c]
    return now


class Greedy(Choice):
    """Always the relay of which most is expected."""

    def draw(self, but: Collection[int] = ()) -> int:
        chances = self.chances()
        return max((relay for relay in range(len(chances)) if relay not in but), key=chances.__getitem__)
