"""TOPLOC: A Locality Sensitive Hashing Scheme for Trustless Verifiable Inference.
Ong, Di Ferrante, Pazdera, Garner, Jaghouar, Basra, Ryabinin, Hagemann, 2025. arXiv:2501.16007

A hash of what a model computed, but it forgives rounding: the largest activations go into a polynomial over a prime
field, and who reads it with activations of his own sees by how much their bits differ.

The k largest of the last hidden states are points, index to the 16 bits of a bfloat16, and through k points goes one
polynomial of k coefficients, 258 bytes at k = 128. Another order of summation moves a few last bits; another model or
prompt has other large entries, at which the polynomial is as good as random. Verifying is a single parallel pass over
the text. The limits are the paper's for bfloat16 at k = 128; the released code leaves them to its caller, and its
median is the upper of the middle two.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import UserError, paper
from deltax.parts.training.generate import generate
from deltax.shapes import Tokens

PRIME = 65497
LEAST = 2**15  # no modulus at or below: the indices would be crowded


class Proof(NamedTuple):
    """Indices are taken by `modulus`; `coefficients`, lowest power first, are in the field of PRIME elements."""

    modulus: int
    coefficients: tuple[int, ...]

    def __bytes__(self) -> bytes:
        """2 + 2 k bytes, all numbers as big-endian uint16, as in the released code."""
        return struct.pack(f">{1 + len(self.coefficients)}H", self.modulus, *self.coefficients)

    @staticmethod
    def read(data: bytes) -> "Proof":
        """The proof that `bytes` wrote. Raises UserError for what is none."""
        if len(data) < 4 or len(data) % 2:
            raise UserError(f"a proof is a modulus and at least one coefficient, 2 bytes each, not {len(data)} bytes")
        modulus, *coefficients = struct.unpack(f">{len(data) // 2}H", data)
        if not LEAST < modulus <= PRIME or max(coefficients) >= PRIME:
            raise UserError(f"a proof has a modulus in ({LEAST}, {PRIME}] and coefficients below {PRIME}; this is none")
        return Proof(modulus, tuple(coefficients))

    def at(self, indices: np.ndarray) -> np.ndarray:
        """What the polynomial says of these indices."""
        x, value = indices % self.modulus, np.zeros(len(indices), np.int64)
        for coefficient in reversed(self.coefficients):
            value = (value * x + coefficient) % PRIME
        return value


class Errors(NamedTuple):
    """How many of the k exponents differ, and mean and median difference of the mantissas where they do not."""

    exponents: int
    mean: float
    median: float
    k: int


class Limits(NamedTuple):
    """The largest errors of an honest run: by default those of the paper for bfloat16. `exponents` is of 128."""

    exponents: int = 38
    mean: float = 10
    median: float = 8

    def accept(self, errors: Errors) -> bool:
        different = errors.exponents * 128 <= self.exponents * errors.k
        return different and errors.mean <= self.mean and errors.median <= self.median

    @staticmethod
    def above(honest: Sequence[Errors]) -> "Limits":
        """Twice the largest errors of honest answers, and an exponent more, for models that are not the paper's."""
        exponents = max(error.exponents * 128 / error.k for error in honest)
        return Limits(int(2 * exponents) + 1, 2 * max(e.mean for e in honest), 2 * max(e.median for e in honest))


def interpolate(x: Sequence[int] | np.ndarray, y: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """The coefficients, lowest power first, of the polynomial of degree below k through k points, modulo PRIME.

    By Newton's divided differences. Raises UserError where two points share an x.
    """
    x, divided = np.asarray(x, np.int64) % PRIME, np.asarray(y, np.int64) % PRIME
    if len(np.unique(x)) != len(x):
        raise UserError("a polynomial goes through points of different x; two of these share one")
    newton = [divided[0]]
    for order in range(1, len(x)):
        divided = (divided[1:] - divided[:-1]) * _inverses()[(x[order:] - x[:-order]) % PRIME] % PRIME
        newton.append(divided[0])
    coefficients = np.zeros(len(x), np.int64)
    for root, value in zip(x[::-1], newton[::-1], strict=True):
        coefficients = (np.concatenate([[0], coefficients[:-1]]) - root * coefficients) % PRIME
        coefficients[0] = (coefficients[0] + value) % PRIME
    return tuple(coefficients.tolist())


def commit(activations: Tensor, *, k: int = 128) -> Proof:
    """The proof of the k largest activations, any shape, as bfloat16.

    Raises UserError for fewer than k activations, and where no modulus keeps the indices apart.
    """
    indices, bits = _largest(activations, k)
    for modulus in range(PRIME, LEAST, -1):
        if len(np.unique(indices % modulus)) == len(indices):
            return Proof(modulus, interpolate(indices % modulus, bits))
    raise UserError(f"no modulus keeps the indices of {k} activations apart: prove fewer tokens at a time")


def compare(activations: Tensor, proof: Proof) -> Errors:
    """How far these activations are from those that were proved. Infinite where no exponent agrees."""
    indices, ours = _largest(activations, len(proof.coefficients))
    theirs = proof.at(indices)
    same = (ours >> 7) & 0xFF == (theirs >> 7) & 0xFF
    apart = np.abs((ours & 0x7F) - (theirs & 0x7F))[same]
    if not len(apart):
        return Errors(len(ours), float("inf"), float("inf"), len(ours))
    return Errors(int((~same).sum()), float(apart.mean()), float(np.median(apart)), len(ours))


def chunks(hidden: Float[Tensor, "T D"], prompt: int, every: int = 32) -> Iterator[Float[Tensor, "_ D"]]:
    """The prompt, then `every` decoded tokens at a time. Raises UserError for a prompt of none or beyond the text."""
    if not 1 <= prompt <= len(hidden) or every < 1:
        raise UserError(f"of {len(hidden)} tokens the prompt is 1 to {len(hidden)}, and `every` is 1 or more")
    yield hidden[:prompt]
    yield from hidden[prompt:].split(every) if len(hidden) > prompt else ()


@paper(year=2025, arxiv="2501.16007")
def toploc(hidden: Float[Tensor, "T D"], *, prompt: int, k: int = 128, every: int = 32) -> list[Proof]:
    """One proof of the prompt's last hidden states, then one of each `every` decoded tokens'.

    A piece of fewer than k activations proves all that it has.
    """
    return [commit(piece, k=min(k, piece.numel())) for piece in chunks(hidden, prompt, every)]


def verify(
    hidden: Float[Tensor, "T D"], proofs: Sequence[Proof], *, prompt: int, k: int = 128, every: int = 32
) -> list[Errors]:
    """The errors of each proof by the verifier's own hidden states.

    Raises UserError where there are not as many proofs as pieces, or one is not of as many activations as it should
    be: the fewer, the easier to guess.
    """
    pieces = list(chunks(hidden, prompt, every))
    if len(pieces) != len(proofs):
        raise UserError(f"a text of {len(hidden)} tokens has {len(pieces)} proofs, not {len(proofs)}")
    for piece, proof in zip(pieces, proofs, strict=True):
        if len(proof.coefficients) != min(k, piece.numel()):
            raise UserError(f"a proof is of {min(k, piece.numel())} activations, not {len(proof.coefficients)}")
    return [compare(piece, proof) for piece, proof in zip(pieces, proofs, strict=True)]


@contextmanager
def last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that collects what the model's head is given, (B, T, D), at each call inside."""
    found: list[Tensor] = []
    hook = model.get_submodule("head").register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def answer(model: nn.Module, prompts: Tokens, *, length: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Text of the model, (B, P + length), and the hidden states it was decoded from, (B, P + length - 1, D)."""
    with last_hidden(model) as found:
        return generate(model, prompts, length=length, **options), torch.cat(found, 1)


@torch.no_grad()
def read(model: nn.Module, tokens: Tokens) -> Tensor:
    """The hidden states of a text in one pass, (B, T - 1, D): the last token of an answer was never read."""
    with last_hidden(model) as found:
        model(tokens[:, :-1])
    return found[0]


@cache
def _inverses() -> np.ndarray:
    """1 / n modulo PRIME for each n, and 0 for 0."""
    found = [0, 1]
    for n in range(2, PRIME):
        found.append(-(PRIME // n) * found[PRIME % n] % PRIME)
    return np.array(found, np.int64)


def _largest(activations: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the k largest by magnitude stand, and their bits."""
    flat = activations.detach().flatten().bfloat16().cpu()
    if not 1 <= k <= len(flat):
        raise UserError(f"of {len(flat)} activations the {k} largest cannot be proved: choose k from 1 to {len(flat)}")
    indices = flat.abs().topk(k).indices
    return indices.numpy(), flat[indices].view(torch.int16).numpy().astype(np.int64) & 0xFFFF
