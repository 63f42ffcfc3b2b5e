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
from contextlib import ExitStack, suppress
from fractions import Fraction
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deltax import UserError, claim, paper
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


@claim
def the_pipelined_time_is_the_closed_form():
    """Over hops of equal bandwidth S shards take (S + h - 1) size / (S bandwidth), exactly; whole, h size / bandwidth;
    over unequal ones the slowest hop sets the pace.
    """
    for shards in (1, 2, 7, 30):
        for hops in (1, 2, 5):
            assert simulate(13, [3] * hops, shards=shards) == transfer_time(13, 3, shards=shards, hops=hops)
    assert transfer_time(13, 3, shards=1, hops=5) == 5 * Fraction(13, 3)
    assert simulate(14, [5, 2, 7], shards=7) == Fraction(2, 5) + 7 * Fraction(2, 2) + Fraction(2, 7)


@claim
def relays_are_drawn_by_what_is_expected_of_them():
    """Without exploration chances are as success rate times bandwidth; with it none falls below its share, so that a
    relay that failed is asked again and comes back.
    """
    choice = Choice(3, weight=1.0, explore=0.0)
    for relay, bandwidth in enumerate((1.0, 2.0, 5.0)):
        choice.learn(relay, bandwidth)
    assert choice.chances() == [1 / 8, 2 / 8, 5 / 8]
    draws = [choice.draw() for _ in range(8000)]
    assert all(abs(draws.count(r) / 8000 - p) < 0.025 for r, p in enumerate((1 / 8, 2 / 8, 5 / 8)))
    choice.learn(2, None)
    assert choice.chances() == [1 / 3, 2 / 3, 0.0]
    choice.explore = 0.3
    assert abs(choice.chances()[2] - 0.1) < 1e-12
    choice.learn(2, 5.0)
    assert choice.chances()[2] > 0.5


@claim
def drawing_beats_the_fastest_under_contention():
    """With 24 clients at relays of bandwidth 1 to 4, all done sooner in each of five simulated runs when relays are
    drawn than when every client asks the one of which it expects most; nobody beats the sum of bandwidths.
    """
    bandwidth = [1.0, 2.0, 3.0, 4.0]
    for seed in range(5):
        times = {}
        for kind in (Choice, Greedy):
            clients = [kind(4, seed=100 * seed + c) for c in range(24)]
            for choice in clients:
                for relay, rate in enumerate(bandwidth):
                    choice.learn(relay, rate)
            times[kind] = contention(clients, bandwidth, shards=20)
        assert times[Choice] < times[Greedy]
        assert times[Choice] >= 24 * 20 / sum(bandwidth)


@claim
def the_origin_sends_a_checkpoint_once_to_each_relay():
    """The origin sends its relays' number times the checkpoint's bytes, and one relay its children's and clients', when
    six clients fetch through a tree of two levels over HTTP.
    """
    shards = cut(Random(0).randbytes(10_007), 7)
    known = manifest(shards)
    with ExitStack() as running:
        origin = running.enter_context(Server(shards))
        a, b = (running.enter_context(Relay(origin.url, known, patience=60)) for _ in range(2))
        leaf = running.enter_context(Relay(a.url, known, patience=60))
        for seed in range(6):
            got = shardcast([b.url, leaf.url], known, choice=Choice(2, seed=seed), patience=60)
            assert got == b"".join(shards)
        for relay in (a, b, leaf):
            relay.wait()
        assert origin.sent == 2 * 10_007
        assert a.sent == 10_007 and b.sent + leaf.sent == 6 * 10_007 and b.sent and leaf.sent


@claim
def a_relay_that_dies_stalls_or_lies_stops_nobody():
    """With one relay dead, one that never answers and one that sends changed shards, clients still get every byte
    right and come to expect less of the three; with no relay left they are told once their patience is over.
    """
    shards = cut(Random(1).randbytes(5_003), 5)
    known = manifest(shards)
    with ExitStack() as running:
        good, liar = (running.enter_context(Server(sent)) for sent in (shards, [s[::-1] for s in shards]))
        silent = running.enter_context(socket.create_server(("127.0.0.1", 0)))
        dead = Server(shards)
        dead.close()
        relays = [dead.url, liar.url, f"http://127.0.0.1:{silent.getsockname()[1]}", good.url]
        choice = Choice(4, seed=1)
        assert shardcast(relays, known, choice=choice, patience=4) == b"".join(shards)
        assert max(choice.success[:3]) < 1
    began = time.monotonic()
    try:
        shardcast([dead.url], known, patience=0.1)
    except UserError as error:
        assert "no relay gave shard 0" in str(error)
    else:
        raise AssertionError("nobody can have sent it")
    assert time.monotonic() - began < 5


@claim.measured(paper="relays hand out shards while they fetch the next (section on SHARDCAST)")
def a_chain_takes_the_closed_form_s_time(lab):
    """Over HTTP and three hops, each a line of 2 MB a second, a checkpoint of 2 MB in 1, 4 and 16 shards takes within
    15 % of what the closed form says."""
    checkpoint = Random(0).randbytes(2 * 10**6)
    said = {s: float(transfer_time(len(checkpoint), _Line.bandwidth, shards=s, hops=3)) for s in (1, 4, 16)}
    seconds = [{s: _through_a_chain(cut(checkpoint, s)) for s in said} for _ in range(3)]
    off = [max(abs(run[s] / said[s] - 1) for s in said) for run in seconds]
    return lab.at_most(off, 0.15, unit="off, the worst", numbers={"closed form": said, "seconds": seconds})


def _through_a_chain(shards: Sequence[bytes]) -> float:
    """Seconds until a client has every shard that the origin hands to a relay, and that one to another."""
    known, began = manifest(shards), time.perf_counter()
    with _Line(shards) as origin, _RelayLine(origin.url, known) as first, _RelayLine(first.url, known) as second:
        assert shardcast([second.url], known) == b"".join(shards)
        return time.perf_counter() - began


class _Line(Server):
    """A server whose line carries `bandwidth` bytes a second, one shard at a time."""

    bandwidth = 2e6

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        shard = self.shards.get(int(request.path.strip("/")))
        with self._lock:
            time.sleep(len(shard or b"") / self.bandwidth)
        super().answer(request)


class _RelayLine(_Line, Relay):
    """A relay that hands out shards over such a line."""
