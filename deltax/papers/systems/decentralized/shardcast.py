"""INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning, section on SHARDCAST.
Prime Intellect Team, Jaghouar, Mattern, Ong, Straube, Basra, Pazdera, Thaman, Di Ferrante, Gabriel, Obeid, Erdem,
Keiblinger, Hagemann, 2025. arXiv:2505.07291

A checkpoint broadcast, but in shards through a tree of relays, which clients draw by expected throughput.

A relay serves each shard while it fetches the next, so the origin sends a checkpoint once to each relay below it,
whatever the number of clients. A client draws a relay in proportion to success rate times bandwidth, both moving
averages, so that clients spread over relays; a part of the draws is uniform, so that a failed relay is tried again. The
paper checks one SHA-256 and waits for the next version on a mismatch; here each shard has a digest, and a wrong one is
fetched from another relay. Servers are HTTP on loopback only.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deltax import UserError, paper
from deltax.errors import StoreError

PATIENCE = 10.0  # seconds until a client or relay gives up


class Manifest(NamedTuple):
    """A checkpoint's description: size and SHA-256 of each shard, in order, and SHA-256 of the whole."""

    sizes: tuple[int, ...]
    shards: tuple[str, ...]
    whole: str


class Choice:
    """Draws a relay in proportion to its expected throughput: success rate times bandwidth.

    weight   of the newest observation in both moving averages
    explore  the share of draws that are uniform
    """

    def __init__(self, relays: int, *, weight: float = 0.3, explore: float = 0.1, seed: int = 0):
        if relays < 1:
            raise UserError(f"a client needs at least one relay, not {relays}: start a relay")
        self.success = [1.0] * relays
        self.bandwidth: list[float | None] = [None] * relays
        self.weight, self.explore, self._random = weight, explore, Random(seed)

    def chances(self) -> list[float]:
        """The probability of each relay."""
        # an untried relay counts as the best one, so that it is tried
        best = max((b for b in self.bandwidth if b is not None), default=1.0)
        rates = [s * (best if b is None else b) for s, b in zip(self.success, self.bandwidth, strict=True)]
        n, total = len(rates), sum(rates)
        # explore / n + (1 - explore) r_i / sum r
        return [self.explore / n + (1 - self.explore) * (r / total if total else 1 / n) for r in rates]

    def draw(self, but: Collection[int] = ()) -> int:
        """A relay that is not in `but`. Raises UserError where all are."""
        left = [relay for relay in range(len(self.success)) if relay not in but]
        if not left:
            raise UserError(f"all {len(self.success)} relays are excluded: exclude fewer")
        chances = self.chances()
        return self._random.choices(left, [chances[relay] or 1e-300 for relay in left])[0]

    def learn(self, relay: int, bandwidth: float | None) -> None:
        """Updates a relay's averages with the bandwidth of a request (bytes a second), or None for a failure."""
        # moving averages: x <- x + weight (new - x)
        old, w = self.bandwidth[relay], self.weight
        self.success[relay] += w * ((bandwidth is not None) - self.success[relay])
        if bandwidth is not None:
            self.bandwidth[relay] = bandwidth if old is None else old + w * (bandwidth - old)


@paper(year=2025, arxiv="2505.07291")
def shardcast(
    relays: Sequence[str], known: Manifest, *, choice: Choice | None = None, patience: float = PATIENCE
) -> bytes:
    """The checkpoint, fetched shard by shard from relays at these addresses and checked against the manifest `known`.

        for each shard:
            until its digest matches: draw a relay that has not failed on this shard; fetch; update its averages
        check the digest of the whole

    A relay has patience / (2 relays) seconds a shard, so that none can stall a client. Raises UserError where no relay
    has sent the next shard for `patience` seconds.
    """
    choice, shards, each = choice or Choice(len(relays)), [], patience / (2 * max(1, len(relays)))
    for index in range(len(known.shards)):
        deadline, failed, shard = time.monotonic() + patience, set[int](), None
        while shard is None:
            if time.monotonic() > deadline:
                raise UserError(f"no relay gave shard {index} within {patience} s: start a relay, or wait longer")
            # every relay failed once: try all again
            if len(failed) == len(relays):
                failed.clear()
                time.sleep(0.005)
            # a new draw for each shard and each attempt
            relay, began = choice.draw(failed), time.perf_counter()
            shard = fetch(relays[relay], index, known, each)
            failed.add(relay)
            choice.learn(relay, None if shard is None else len(shard) / (time.perf_counter() - began))
        shards.append(shard)
    whole = b"".join(shards)
    if digest(whole) != known.whole:
        raise UserError("all shards match and the checkpoint does not: its manifest is wrong, wait for the next")
    return whole


def fetch(url: str, index: int, known: Manifest, patience: float = PATIENCE) -> bytes | None:
    """The shard, or None where the server has none, sends a wrong one, or takes longer than `patience` seconds."""
    link, size = HTTPConnection(urlsplit(url).netloc, timeout=patience), known.sizes[index]
    shard = b""
    try:
        link.connect()
        hurry = threading.Timer(patience, _hang_up, (link.sock,))
        hurry.start()
        try:
            link.request("GET", f"/{index}")
            answer = link.getresponse()
            if answer.status == 200:  # redirections are not followed
                shard = answer.read(size)
        finally:
            hurry.cancel()
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        link.close()
    return shard if digest(shard) == known.shards[index] else None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cut(checkpoint: bytes, shards: int) -> list[bytes]:
    """The checkpoint in shards whose sizes differ by at most one byte. Raises UserError for fewer bytes than shards."""
    if not 1 <= shards <= len(checkpoint):
        raise UserError(f"cannot cut {len(checkpoint)} bytes into {shards} shards: choose 1 to {len(checkpoint)}")
    ends = [len(checkpoint) * i // shards for i in range(shards + 1)]
    return [checkpoint[a:b] for a, b in pairwise(ends)]


def manifest(shards: Sequence[bytes]) -> Manifest:
    return Manifest(tuple(map(len, shards)), tuple(map(digest, shards)), digest(b"".join(shards)))


def keep(checkpoint: bytes, path: Path) -> None:
    """Atomic write: the file is whole or absent, whenever the process dies. Raises StoreError when it cannot be."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        # a rename is atomic, a write is not
        scratch.write_bytes(checkpoint)
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from None


class Http(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Ignores clients that disconnect."""


class Server:
    """Serves shards at http://127.0.0.1:PORT/INDEX; 404 for a shard that it does not have yet.

    `sent` counts the bytes of shards sent. Use as a context manager, which closes it.
    """

    def __init__(self, shards: Sequence[bytes] = ()):
        self.shards: dict[int, bytes] = dict(enumerate(shards))
        self.sent = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = PATIENCE  # for a client that neither sends nor reads

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                """No log."""

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
    """Fetches the shards of `known` from its parent in order, and serves each once its digest matches.

    It stops when its parent has not sent the next shard for `patience` seconds, or when it is closed.
    """

    def __init__(self, parent: str, known: Manifest, *, patience: float = PATIENCE):
        super().__init__()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(parent, known, patience), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until it has all shards or has stopped."""
        self._thread.join()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _fill(self, parent: str, known: Manifest, patience: float) -> None:
        for index in range(len(known.shards)):
            deadline = time.monotonic() + patience
            # the parent may not have the shard yet: ask until it has
            while (shard := fetch(parent, index, known, patience / 2)) is None:
                if self._closed.wait(0.005) or time.monotonic() > deadline:
                    return
            self.shards[index] = shard


def _hang_up(line: socket.socket) -> None:
    """Shuts the socket down, which ends a read that blocks on it."""
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
