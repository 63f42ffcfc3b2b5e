"""Where the workers of a run agree on who is there, round after round: some die, some come back, and nobody waits long.

A register (a `torch.distributed` TCPStore, in a process that trains nothing) holds what is agreed. In each round those
who are there name the members, first proposal wins; the members find their mean on a gloo process group of their own;
and the round counts when all of them have it. Where one is lost on the way the round is held again among the rest. Who
comes back is handed what is shared by the first of the members, after a round that it did not take part in.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from deltax.errors import UserError

Found = TypeVar("Found")
POLL = 0.02
ATTEMPTS = 20


def register(port: int = 0) -> distributed.TCPStore:
    """The register of a run, held by this process for as long as the object lives; `.port` is where it listens."""
    return distributed.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)


class Meeting:
    """One worker's seat at the meetings of a run.

    at        "host:port" of the register
    worker    its number, below `workers`
    patience  seconds it waits for the others, in a round and in a transfer
    start     seconds it waits for all to come to the first round

    Raises UserError when the register cannot be reached.
    """

    def __init__(self, at: str, worker: int, workers: int, *, patience: float = 60.0, start: float = 600.0):
        host, _, port = at.rpartition(":")
        if not 0 <= worker < workers:
            raise UserError(f"there is no worker {worker} of {workers}: they count from 0")
        self.worker, self.workers, self.patience, self.start = worker, workers, patience, start
        self.members: list[int] = []
        try:
            wait = timedelta(seconds=patience)
            self.store = distributed.TCPStore(host, int(port), is_master=False, timeout=wait, wait_for_workers=False)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"no register of a run answers at {at!r}: start one there first ({error})") from None

    def same(self, name: str) -> None:
        """Say which run this worker is of. Raises UserError when another worker of this register said another."""
        with _reached():
            said = json.loads(self.store.compare_set("run", "", json.dumps(name)))
        if said != name:
            raise UserError(f"the others train run {said}, this is {name}: give all workers one job, data and code")

    @property
    def begun(self) -> bool:
        """Whether a round has been held already."""
        return self._read("roster") is not None

    def hold(self, round: int, exchange: Callable[[Any], Found]) -> Found | None:
        """What exchange(group) finds among the members of a round, which all of them have found; None where this worker
        came too late and the round went on without it. Raises UserError when the register is lost.
        """
        with _reached():
            for attempt in range(ATTEMPTS):
                name = f"{round}.{attempt}"
                self.members = self._agree_on_members(name)
                if self.worker not in self.members:
                    return None
                found = self._try(name, exchange)
                if found is not None:
                    self._write("roster", self.members)
                    return found
        raise UserError(f"round {round} failed {ATTEMPTS} times: workers are lost faster than they can meet")

    def welcome(self, state: Callable[[], list[Tensor]]) -> list[int]:
        """Hand the state to all who wait to join, if this worker is the first of the members; who was let in.

        Raises UserError when the register is lost.
        """
        with _reached():
            return self._welcome(state)

    def _welcome(self, state: Callable[[], list[Tensor]]) -> list[int]:
        if self.worker != self.members[0]:
            return []
        let_in = []
        for other in range(self.workers):
            token = self._read(f"joining/{other}")
            if token is None or other in self.members:
                continue
            self.store.delete_key(f"joining/{other}")
            self._write("roster", sorted({*self.members, *let_in, other}))
            self._write(f"invited/{token}", self.worker)
            try:
                group = self._group(f"welcome/{token}", 0, 2)
                for tag, tensor in enumerate(state()):
                    group.send([tensor.contiguous()], 1, tag).wait()
                let_in.append(other)
            except RuntimeError:
                self._write("roster", sorted({*self.members, *let_in}))
        return let_in

    def join(self, state: list[Tensor], *, within: float) -> None:
        """Wait to be let in, and fill `state` with what was handed over. Raises UserError after `within` seconds, when
        the run is over, and when the register is lost.
        """
        with _reached():
            self._join(state, within)

    def _join(self, state: list[Tensor], within: float) -> None:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            token = f"{self.worker}.{self.store.add('tokens', 1)}"
            self._write(f"joining/{self.worker}", token)
            while self._read(f"invited/{token}") is None:
                if self._read("over"):
                    raise UserError("the run is over: there is nothing to join")
                if time.monotonic() > deadline:
                    raise UserError(f"nobody let worker {self.worker} in within {within:g} s: is the run still going?")
                time.sleep(POLL)
            try:
                group = self._group(f"welcome/{token}", 1, 2)
                for tag, tensor in enumerate(state):
                    group.recv([tensor], 0, tag).wait()
                return
            except RuntimeError:
                continue
        raise UserError(f"nobody let worker {self.worker} in within {within:g} s: is the run still going?")

    def close(self) -> None:
        """The last round has been held."""
        with _reached():
            self._write("over", True)

    def _agree_on_members(self, name: str) -> list[int]:
        self._write(f"{name}/here/{self.worker}", True)
        deadline = time.monotonic() + (self.patience if self.begun else self.start)
        while True:
            decided = self._read(f"{name}/members")
            if decided is not None:
                return decided
            roster = self._read("roster") or list(range(self.workers))
            here = [w for w in range(self.workers) if self.store.check([f"{name}/here/{w}"])]
            if set(roster) <= set(here) or time.monotonic() > deadline:
                return json.loads(self.store.compare_set(f"{name}/members", "", json.dumps(here)))
            time.sleep(POLL)

    def _try(self, name: str, exchange: Callable[[Any], Found]) -> Found | None:
        """What the exchange finds if all members found it, else None; all of them come to the same of the two."""
        found = None
        try:
            found = exchange(self._group(f"{name}/group", self.members.index(self.worker), len(self.members)))
            self._write(f"{name}/done/{self.worker}", True)
        except RuntimeError:
            self.store.compare_set(f"{name}/outcome", "", json.dumps(False))
        deadline = time.monotonic() + self.patience
        while (outcome := self._read(f"{name}/outcome")) is None:
            done = all(self.store.check([f"{name}/done/{w}"]) for w in self.members)
            if done or time.monotonic() > deadline:
                self.store.compare_set(f"{name}/outcome", "", json.dumps(done))
            time.sleep(POLL)
        if not outcome:
            self._write("roster", self._left(name))
        return found if outcome else None

    def _left(self, name: str) -> list[int]:
        """The members who are heard of after a failed round: those of whom nothing comes are not waited for."""
        self._write(f"{name}/left/{self.worker}", True)
        deadline = time.monotonic() + min(1.0, self.patience)
        while time.monotonic() < deadline and not all(self.store.check([f"{name}/left/{w}"]) for w in self.members):
            time.sleep(POLL)
        return [w for w in self.members if self.store.check([f"{name}/left/{w}"])]

    def _group(self, name: str, rank: int, size: int) -> Any:
        store = distributed.PrefixStore(name, self.store)
        return distributed.ProcessGroupGloo(store, rank, size, timedelta(seconds=self.patience))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _write(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except distributed.DistNetworkError as error:
        raise UserError(f"the register of the run is gone ({str(error).splitlines()[0]})") from None


def numbers(*values: float) -> Tensor:
    """Values as a tensor that can be sent."""
    return torch.tensor(values, dtype=torch.float64)
