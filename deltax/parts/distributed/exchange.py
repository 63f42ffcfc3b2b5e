"""How workers find the mean of their vectors, in one process and over a process group, with the bytes it takes.

An exchange has two ways that give the same mean: `among(vectors)` plays all workers in this process, and
`over(group, vector)` is one worker's side of it on a `torch.distributed` process group. `sent` counts the bytes of what
a worker has put on the wire so far, the payload alone; of `among`, those of the worker that sent most.
"""

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltax.recipe import Part, part

Payload = tuple[Tensor, ...]


class Exact:
    """A code that changes nothing. A code makes of a vector (N,) a payload of tensors, and a vector of a payload; the
    payload's shapes and types depend on N and the vector's type alone.
    """

    def encode(self, vector: Tensor) -> Payload:
        return (vector,)

    def decode(self, payload: Payload) -> Tensor:
        return payload[0]


class Exchange(abc.ABC):
    """Finds means, each message in a code."""

    def __init__(self, *, code: Part = part(Exact)):
        self.code = code()
        self.sent = 0

    @abc.abstractmethod
    def among(self, vectors: Mapping[int, Tensor]) -> Tensor:
        """The mean of the vectors (N,) of the workers named by the keys, as each of them decodes it."""

    @abc.abstractmethod
    def over(self, group: Any, vector: Tensor) -> Tensor:
        """The mean over all of the group of each one's vector (N,). Raises RuntimeError when a peer is lost."""

    @abc.abstractmethod
    def prepare(self, workers: int, vector: Tensor) -> None:
        """Make room for what is remembered of so many workers' vectors of this length. Called once, at the start."""

    @abc.abstractmethod
    def memory(self) -> dict[str, Tensor]:
        """What is remembered from one exchange to the next, to be restored in place."""


class Ring(Exchange):
    """All-reduce around a ring: in P - 1 hops each P-th of the sum collects its terms, in P - 1 more it goes round.

    Each worker sends 2 (P - 1) messages of N / P numbers. What arrives is decoded, added to and encoded again at every
    hop of the first half; in the second the message of the mean goes round as it is.
    """

    def among(self, vectors: Mapping[int, Tensor]) -> Tensor:
        chunks = [_chunks(v, len(vectors)) for v in vectors.values()]
        size, first = len(chunks), next(iter(vectors.values()))
        if size == 1:
            return first
        means = []
        for c in range(size):
            total = chunks[c][c]
            for hop in range(1, size):
                total = self.code.decode(self.code.encode(total)) + chunks[(c + hop) % size][c]
            means.append(self.code.decode(self.code.encode(total / size)))
        self.sent += 2 * (size - 1) * nbytes(self.code.encode(chunks[0][0]))
        return torch.cat(means)[: len(first)]

    def over(self, group: Any, vector: Tensor) -> Tensor:
        size, rank = group.size(), group.rank()
        if size == 1:
            return vector
        totals = list(_chunks(vector, size))
        form = self.code.encode(torch.zeros_like(totals[0]))
        for hop in range(size - 1):
            payload = self._pass_on(group, self.code.encode(totals[(rank - hop) % size]), form)
            at = (rank - hop - 1) % size
            totals[at] = self.code.decode(payload) + totals[at]
        payload = self.code.encode(totals[(rank + 1) % size] / size)
        for hop in range(size):
            totals[(rank + 1 - hop) % size] = self.code.decode(payload)
            if hop < size - 1:
                payload = self._pass_on(group, payload, form)
        return torch.cat(totals)[: len(vector)]

    def prepare(self, workers: int, vector: Tensor) -> None:
        pass

    def memory(self) -> dict[str, Tensor]:
        return {}

    def _pass_on(self, group: Any, payload: Payload, form: Payload) -> Payload:
        size, rank = group.size(), group.rank()
        received = tuple(torch.empty_like(t) for t in form)
        works = [group.send([t.contiguous()], (rank + 1) % size, tag) for tag, t in enumerate(payload)]
        works += [group.recv([t], (rank - 1) % size, tag) for tag, t in enumerate(received)]
        for work in works:
            work.wait()
        self.sent += nbytes(payload)
        return received


def nbytes(payload: Payload) -> int:
    """The size of a payload."""
    return sum(t.numel() * t.element_size() for t in payload)


def ring_bytes(numbers: int, workers: int, *, width: int = 4) -> int:
    """What each worker sends in a ring all-reduce of so many numbers of `width` bytes: 2 (P - 1) / P of them, chunks
    rounded up.
    """
    return 2 * (workers - 1) * -(-numbers // workers) * width


def _chunks(vector: Tensor, count: int) -> tuple[Tensor, ...]:
    """In `count` equal pieces, the last padded with zeros."""
    size = -(-len(vector) // count)
    return torch.nn.functional.pad(vector, (0, size * count - len(vector))).split(size)
