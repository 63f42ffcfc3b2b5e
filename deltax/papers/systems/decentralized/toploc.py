"""TOPLOC: A Locality Sensitive Hashing Scheme for Trustless Verifiable Inference.
Ong, Di Ferrante, Pazdera, Garner, Jaghouar, Basra, Ryabinin, Hagemann, 2025. arXiv:2501.16007

A hash of a model's activations, but tolerant of rounding: a polynomial through the largest ones measures the error.

The k largest of the last hidden states are points (index, 16 bits of a bfloat16), and one polynomial of k coefficients
over a prime field passes through them: 258 bytes at k = 128. A verifier that recomputes the activations measures how
far its bits differ. Another order of summation changes a few last bits; another model or prompt has other largest
entries, where the polynomial is as good as random. Verification is one parallel pass over the text. The limits are the
paper's for bfloat16 at k = 128; the released code leaves them to the caller and takes the upper of two medians.
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

PRIME = 65497  # the field; just below 2^16
LEAST = 2**15  # smaller moduli would map too many indices alike


class Proof(NamedTuple):
    """`coefficients`, lowest power first, in the field of PRIME elements; indices are taken modulo `modulus`."""

    modulus: int
    coefficients: tuple[int, ...]

    def __bytes__(self) -> bytes:
        """2 + 2 k bytes, all numbers as big-endian uint16, as in the released code."""
        return struct.pack(f">{1 + len(self.coefficients)}H", self.modulus, *self.coefficients)

    @staticmethod
    def read(data: bytes) -> "Proof":
        """The proof from its bytes. Raises UserError for bytes that are no proof."""
        if len(data) < 4 or len(data) % 2:
            raise UserError(f"a proof has an even number of at least 4 bytes, not {len(data)}: send bytes(proof)")
        modulus, *coefficients = struct.unpack(f">{len(data) // 2}H", data)
        if not LEAST < modulus <= PRIME or max(coefficients) >= PRIME:
            raise UserError(
                f"modulus {modulus} or a coefficient is outside ({LEAST}, {PRIME}] or [0, {PRIME}): send bytes(proof)"
            )
        return Proof(modulus, tuple(coefficients))

    def at(self, indices: np.ndarray) -> np.ndarray:
        """The polynomial at these indices."""
        # Horner's rule modulo PRIME
        x, value = indices % self.modulus, np.zeros(len(indices), np.int64)
        for coefficient in reversed(self.coefficients):
            value = (value * x + coefficient) % PRIME
        return value


class Errors(NamedTuple):
    """Number of differing exponents of k, and mean and median mantissa difference where exponents agree."""

    exponents: int
    mean: float
    median: float
    k: int


@paper(year=2025, arxiv="2501.16007")
def toploc(hidden: Float[Tensor, "T D"], *, prompt: int, k: int = 128, every: int = 32) -> list[Proof]:
    """Proofs of the last hidden states: one of the prompt's, then one of each `every` decoded tokens'.

    A piece with fewer than k activations uses all of them.
    """
    return [commit(piece, k=min(k, piece.numel())) for piece in chunks(hidden, prompt, every)]


def commit(activations: Tensor, *, k: int = 128) -> Proof:
    """The proof of the k largest activations, any shape, as bfloat16.

    Raises UserError for fewer than k activations, and where no modulus keeps the indices apart.
    """
    indices, bits = _largest(activations, k)
    for modulus in range(PRIME, LEAST, -1):
        # the largest modulus for which the indices stay different
        if len(np.unique(indices % modulus)) == len(indices):
            return Proof(modulus, interpolate(indices % modulus, bits))
    raise UserError(f"no modulus keeps the indices of {k} activations apart: use fewer tokens a proof")


def interpolate(x: Sequence[int] | np.ndarray, y: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """Coefficients, lowest power first, of the polynomial of degree below k through k points, modulo PRIME.

    By Newton's divided differences. Raises UserError where two points share an x.
    """
    x, divided = np.asarray(x, np.int64) % PRIME, np.asarray(y, np.int64) % PRIME
    if len(np.unique(x)) != len(x):
        raise UserError(f"{len(x)} points have {len(np.unique(x))} different x: choose a modulus that keeps them apart")
    # Newton's form: f[x_0], f[x_0, x_1], ...
    newton = [divided[0]]
    for order in range(1, len(x)):
        divided = (divided[1:] - divided[:-1]) * _inverses()[(x[order:] - x[:-order]) % PRIME] % PRIME
        newton.append(divided[0])
    # expanded to powers: p <- p (x - root) + value
    coefficients = np.zeros(len(x), np.int64)
    for root, value in zip(x[::-1], newton[::-1], strict=True):
        coefficients = (np.concatenate([[0], coefficients[:-1]]) - root * coefficients) % PRIME
        coefficients[0] = (coefficients[0] + value) % PRIME
    return tuple(coefficients.tolist())


def verify(
    hidden: Float[Tensor, "T D"], proofs: Sequence[Proof], *, prompt: int, k: int = 128, every: int = 32
) -> list[Errors]:
    """The errors of each proof against the verifier's own hidden states.

    Raises UserError for a wrong number of proofs or coefficients: fewer coefficients are easier to guess.
    """
    pieces = list(chunks(hidden, prompt, every))
    if len(pieces) != len(proofs):
        raise UserError(
            f"{len(hidden)} tokens need {len(pieces)} proofs, not {len(proofs)}: prove with the same prompt and every"
        )
    for piece, proof in zip(pieces, proofs, strict=True):
        if len(proof.coefficients) != min(k, piece.numel()):
            raise UserError(
                f"a proof must have {min(k, piece.numel())} coefficients, not {len(proof.coefficients)}: use the same k"
            )
    return [compare(piece, proof) for piece, proof in zip(pieces, proofs, strict=True)]


def compare(activations: Tensor, proof: Proof) -> Errors:
    """The errors of these activations against a proof. Infinite where no exponent agrees."""
    indices, ours = _largest(activations, len(proof.coefficients))
    theirs = proof.at(indices)
    # bfloat16: 8 bits of exponent above 7 of mantissa
    same = (ours >> 7) & 0xFF == (theirs >> 7) & 0xFF
    apart = np.abs((ours & 0x7F) - (theirs & 0x7F))[same]
    if not len(apart):
        return Errors(len(ours), float("inf"), float("inf"), len(ours))
    return Errors(int((~same).sum()), float(apart.mean()), float(np.median(apart)), len(ours))


class Limits(NamedTuple):
    """The largest accepted errors; defaults are the paper's for bfloat16. `exponents` is of 128."""

    exponents: int = 38
    mean: float = 10
    median: float = 8

    def accept(self, errors: Errors) -> bool:
        different = errors.exponents * 128 <= self.exponents * errors.k
        return different and errors.mean <= self.mean and errors.median <= self.median

    @staticmethod
    def above(honest: Sequence[Errors]) -> "Limits":
        """Twice the largest errors of honest answers, and one exponent more, for models unlike the paper's."""
        exponents = max(error.exponents * 128 / error.k for error in honest)
        return Limits(int(2 * exponents) + 1, 2 * max(e.mean for e in honest), 2 * max(e.median for e in honest))


def chunks(hidden: Float[Tensor, "T D"], prompt: int, every: int = 32) -> Iterator[Float[Tensor, "_ D"]]:
    """The prompt, then `every` decoded tokens at a time. Raises UserError for a prompt of 0 or longer than the text."""
    if not 1 <= prompt <= len(hidden) or every < 1:
        raise UserError(
            f"prompt={prompt}, every={every} do not fit {len(hidden)} tokens: choose prompt <= {len(hidden)}, both >= 1"
        )
    yield hidden[:prompt]
    yield from hidden[prompt:].split(every) if len(hidden) > prompt else ()


@contextmanager
def last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that collects the input of the model's head, (B, T, D), at each call inside."""
    found: list[Tensor] = []
    hook = model.get_submodule("head").register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def answer(model: nn.Module, prompts: Tokens, *, length: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Generated text (B, P + length), and its hidden states while decoding (B, P + length - 1, D)."""
    with last_hidden(model) as found:
        return generate(model, prompts, length=length, **options), torch.cat(found, 1)


@torch.no_grad()
def read(model: nn.Module, tokens: Tokens) -> Tensor:
    """Hidden states of a text in one pass, (B, T - 1, D); the last token has none."""
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
    """Indices of the k largest activations by magnitude, and their bits."""
    flat = activations.detach().flatten().bfloat16().cpu()
    if not 1 <= k <= len(flat):
        raise UserError(f"cannot take the {k} largest of {len(flat)} activations: choose k from 1 to {len(flat)}")
    indices = flat.abs().topk(k).indices
    return indices.numpy(), flat[indices].view(torch.int16).numpy().astype(np.int64) & 0xFFFF
