"""Claims of shardcast: the paper's equations, parity with peers, and what it measures."""

import socket
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from random import Random

from deltax import UserError, claim
from deltax.papers.systems.decentralized.shardcast import (
    Choice,
    Relay,
    Server,
    cut,
    manifest,
    shardcast,
)


@claim
def the_pipelined_time_is_the_closed_form():
    """Over 1 to 5 equal hops, S shards take exactly (S + h - 1) size / (S bandwidth); over unequal hops the slowest
    sets the pace.
    """
    for shards in (1, 2, 7, 30):
        for hops in (1, 2, 5):
            assert simulate(13, [3] * hops, shards=shards) == transfer_time(13, 3, shards=shards, hops=hops)
    assert transfer_time(13, 3, shards=1, hops=5) == 5 * Fraction(13, 3)
    assert simulate(14, [5, 2, 7], shards=7) == Fraction(2, 5) + 7 * Fraction(2, 2) + Fraction(2, 7)


@claim
def relays_are_drawn_by_what_is_expected_of_them():
    """Without exploration, draws of 3 relays follow success rate times bandwidth; with it a failed relay is drawn and
    recovers.
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
    """In 5 simulations, 24 clients of 4 relays finish sooner with weighted draws than when each takes its fastest
    relay.
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
    """Over a two-level HTTP tree with six clients, the origin sends the checkpoint twice, once to each relay below
    it.
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
    """With one dead, one silent and one corrupting relay of four, a client gets all bytes right. With no relay it
    raises UserError.
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
    """Over three HTTP hops of 2 MB/s, a 2 MB checkpoint in 1, 4 and 16 shards takes the closed form's time within
    15 %.
    """
    checkpoint = Random(0).randbytes(2 * 10**6)
    said = {s: float(transfer_time(len(checkpoint), _Line.bandwidth, shards=s, hops=3)) for s in (1, 4, 16)}
    seconds = [{s: _through_a_chain(cut(checkpoint, s)) for s in said} for _ in range(3)]
    off = [max(abs(run[s] / said[s] - 1) for s in said) for run in seconds]
    return lab.at_most(off, 0.15, unit="off, the worst", numbers={"closed form": said, "seconds": seconds})


def _through_a_chain(shards: Sequence[bytes]) -> float:
    """Seconds until a client has every shard through two relays."""
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


def transfer_time(size: float, bandwidth: float, *, shards: int, hops: int) -> Fraction:
    """Seconds until the last byte has passed the last hop: (S + h - 1) size / (S bandwidth)."""
    return (shards + hops - 1) * Fraction(size) / (shards * Fraction(bandwidth))


def simulate(size: float, bandwidth: Sequence[float], *, shards: int) -> Fraction:
    """The same by events: each hop, with its own bandwidth, forwards one shard at a time, in order."""
    there = [Fraction(0)] * shards
    for rate in bandwidth:
        free = Fraction(0)
        for i, since in enumerate(there):
            free = max(free, since) + Fraction(size) / shards / Fraction(rate)
            there[i] = free
    return there[-1]


def contention(clients: Sequence[Choice], bandwidth: Sequence[float], *, shards: int) -> float:
    """Seconds until all clients have all shards of size 1, when requests share a relay's bandwidth equally."""
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
    """Always the relay with the highest expected throughput."""

    def draw(self, but: Collection[int] = ()) -> int:
        chances = self.chances()
        return max((relay for relay in range(len(chances)) if relay not in but), key=chances.__getitem__)
