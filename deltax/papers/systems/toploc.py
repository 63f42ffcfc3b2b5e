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
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import UserError, claim, paper
from deltax.parts.generate import generate
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


@claim
def untampered_activations_verify_without_error():
    """The proof of activations, sent as bytes, verifies them with no error at all, prompt and odd last piece too."""
    torch.manual_seed(0)
    hidden = torch.randn(5 + 32 + 7, 33).bfloat16()
    proofs = [Proof.read(bytes(proof)) for proof in toploc(hidden, prompt=5)]
    assert len(proofs) == 3
    assert verify(hidden, proofs, prompt=5) == [Errors(0, 0.0, 0.0, 128)] * 3
    assert verify(hidden.float(), proofs, prompt=5) == [Errors(0, 0.0, 0.0, 128)] * 3
    other = verify(torch.randn(44, 33).bfloat16(), proofs, prompt=5)
    assert not any(Limits().accept(errors) for errors in other)


@claim
def a_proof_has_two_bytes_and_two_for_each_activation():
    """A proof has 2 + 2 k bytes, 258 at k = 128; the hidden states of 32 tokens of an 8B Llama have 262,144."""
    torch.manual_seed(0)
    hidden = torch.randn(32, 4096).bfloat16()
    for k in (1, 7, 128):
        assert len(bytes(commit(hidden, k=k))) == 2 + 2 * k
    assert len(bytes(commit(hidden))) == 258
    assert hidden.numel() * hidden.element_size() == 262_144 > 1000 * 258


@claim
def each_changed_bit_is_counted():
    """One exponent changed is one mismatch, and a mantissa off by 3 is 3 in the mean of those that agree."""
    values = (1.5 + torch.arange(9) / 128).bfloat16()
    proof = commit(values, k=9)
    changed = values.clone()
    changed[4] *= 2
    assert compare(changed, proof) == Errors(1, 0.0, 0.0, 9)
    changed = values.clone()
    changed[2] += 3 / 128
    assert compare(changed, proof) == Errors(0, 3 / 9, 0.0, 9)


@claim.parity(peer="sympy over GF(65497)")
def the_polynomial_is_sympys():
    """The coefficients are what sympy gets from the linear equations of the points over the field of 65497 elements."""
    from sympy import GF
    from sympy.polys.matrices import DomainMatrix

    field = GF(PRIME, symmetric=False)
    random = np.random.default_rng(0)
    for k in (1, 2, 17):
        x, y = random.choice(PRIME, k, replace=False), random.integers(0, 2**16, k)
        powers = DomainMatrix([[field(int(a)) ** i for i in range(k)] for a in x], (k, k), field)
        solved = powers.lu_solve(DomainMatrix([[field(int(b))] for b in y], (k, 1), field))
        assert interpolate(x, y) == tuple(int(c) for c in solved.to_list_flat())


@claim.measured(paper="no false positives, no false negatives: models, prompts (abstract)")
def another_model_or_prompt_is_seen(lab):
    """With limits of twice the largest errors of 32 honest answers, less than 5 % of other honest answers of a small
    gpt in bfloat16, decoded and read in other batches and by other numbers of threads, are rejected, and less than 5 %
    of those by other weights or to another prompt are accepted.

    An answer is 32 decoded tokens with one proof; 32 answers of each kind from each of 3 models. Other weights are
    another seed's, and the same after 20 more steps. What the paper's limits, those of 8 billion parameters and more,
    come to is told beside.
    """
    return _verdict(lab, _rates(lab, (*HONEST, "other seed", "20 more steps", "other prompt")))


@claim.measured(paper="no false positives, no false negatives: precisions (abstract)")
def another_precision_is_seen(lab):
    """With limits of twice the largest errors of 32 honest answers, less than 5 % of other honest answers of a small
    gpt in bfloat16 are rejected, and less than 5 % of those that came from weights of 8 bits (int8 by rows, fp8) or 4
    bits are accepted.

    Set up as the claim on models and prompts.
    """
    return _verdict(lab, _rates(lab, (*HONEST, *ROUNDED)))


HONEST = ("decoded alone", "read alone", "read on two threads")


class Sorted(NamedTuple):
    """An answer's errors, and whether it is accepted by the limits of its model."""

    errors: Errors
    accepted: bool


def _rates(lab: Any, kinds: Sequence[str]) -> dict[str, list[Sorted]]:
    """32 answers a model of every kind, each read by the model they were promised of."""
    found: dict[str, list[Sorted]] = {kind: [] for kind in kinds}
    recipe = lab.recipe("gpt(dim=64, depth=2, heads=2)").put("loop.batch", 4)
    for seed in lab.seeds(3):
        run = lab.train(recipe, seed=seed, steps=100)
        promised = deepcopy(run.model).bfloat16()
        others = {"other seed": lambda s=seed: lab.train(recipe, seed=s + 100, steps=100).model}
        others["20 more steps"] = lambda r=run, s=seed: (
            lab.train(recipe, seed=s + 200, steps=20, rate=0.3, weights=r.model.state_dict()).model
        )
        for kind, rounded in ROUNDED.items():
            others[kind] = lambda r=run, f=rounded: _with_weights(r.model, f)
        first, prompts = run.task.batch(10**6, size=64, seed=seed).inputs[:, :32].split(32)
        limits = Limits.above(_trial("honest", promised, promised, first))
        for kind in kinds:
            model = deepcopy(others[kind]()).bfloat16() if kind in others else promised
            found[kind] += [Sorted(e, limits.accept(e)) for e in _trial(kind, model, promised, prompts)]
    return found


def _trial(kind: str, model: nn.Module, promised: nn.Module, prompts: Tokens) -> list[Errors]:
    """Decoded and read in batches of 16 on one thread, but for what the kind says."""
    said = torch.cat([prompts[:, :16].flip(0), prompts[:, 16:]], 1) if kind == "other prompt" else prompts
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    batches = said.split(1 if kind == "decoded alone" else 16)
    given = [answer(model, batch, length=33, generator=generator) for batch in batches]
    proofs = [toploc(row, prompt=32)[1] for _, states in given for row in states]
    texts = torch.cat([prompts, torch.cat([tokens for tokens, _ in given])[:, 32:]], 1)
    try:
        torch.set_num_threads(2 if kind == "read on two threads" else 1)
        states = torch.cat([read(promised, batch) for batch in texts.split(1 if kind == "read alone" else 16)])
    finally:
        torch.set_num_threads(threads)
    return [compare(row[32:], proof) for row, proof in zip(states, proofs, strict=True)]


def _verdict(lab: Any, found: dict[str, list[Sorted]]) -> Any:
    """By the exact interval of each kind's rate of wrong decisions; the estimate is the worst kind's."""
    from scipy.stats import binomtest

    numbers: dict[str, Any] = {}
    tests = {}
    curves = {kind: _roc(found, kind) for kind in found if kind not in HONEST}
    for kind, answers in found.items():
        wrong = sum(a.accepted != (kind in HONEST) for a in answers)
        tests[kind] = (wrong, binomtest(wrong, len(answers)).proportion_ci(0.95, method="exact"))
        name = "rejected" if kind in HONEST else "accepted"
        numbers[f"{kind}: {name}"] = [wrong, len(answers)]
        by_paper = sum(Limits().accept(a.errors) != (kind in HONEST) for a in answers)
        numbers[f"{kind}: {name} at the paper's limits"] = [by_paper, len(answers)]
        middle = np.nan_to_num(np.median([a.errors[:3] for a in answers], axis=0), posinf=128.0)
        numbers[f"{kind}: median of exponents, mean, median"] = [float(v) for v in middle]
    for kind, curve in curves.items():
        areas = [float(np.trapezoid(caught, refused)) for refused, caught in curve]
        numbers[f"{kind}: areas under the three ROC curves"] = areas
    kind = max(tests, key=lambda k: tests[k][0])
    wrong, interval = tests[kind]
    ends = [ci for _, ci in tests.values()]
    outcome = "supported at this scale" if all(ci.high < 0.05 for ci in ends) else "inconclusive"
    if any(ci.low > 0.05 for ci in ends):
        outcome = "not seen at this scale"
    return lab.verdict(
        outcome,
        estimate=wrong / len(found[kind]),
        interval=(float(interval.low), float(interval.high)),
        unit=f"of answers decided wrongly, {kind}",
        numbers=numbers,
        figures={"Honest answers refused against others caught, by the limit on each error": _drawn(lab, curves)},
    )


def _roc(found: dict[str, list[Sorted]], kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of the three errors: the shares of honest answers, and of this kind's, above each limit."""
    honest = np.array([a.errors[:3] for name in HONEST for a in found[name]])
    other = np.array([a.errors[:3] for a in found[kind]])
    curves = []
    for ours, theirs in zip(honest.T, other.T, strict=True):
        limits = np.concatenate([[np.inf], np.unique(np.concatenate([ours, theirs]))[::-1], [-1]])
        curves.append(tuple((values > limits[:, None]).mean(1) for values in (ours, theirs)))
    return curves


def _drawn(lab: Any, curves: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3))
    for place, name in zip(figure.subplots(1, 3, sharey=True), ("exponents", "mean", "median"), strict=True):
        for kind, curve in curves.items():
            place.plot(*curve[("exponents", "mean", "median").index(name)], label=kind)
        place.set(title=name, xlabel="honest, refused")
    place.legend(frameon=False)
    return lab.figure(figure)


def int_by_rows(weight: Tensor, bits: int) -> Tensor:
    """The weight as whole numbers of so many bits times a scale for each row."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    return (weight / scale).round().clamp(-top, top) * scale


ROUNDED = {
    "int8": lambda weight: int_by_rows(weight, 8),
    "fp8": lambda weight: weight.to(torch.float8_e4m3fn).to(weight.dtype),
    "int4": lambda weight: int_by_rows(weight, 4),
}


def _with_weights(model: nn.Module, rounded: Any) -> nn.Module:
    """A copy whose matrices are rounded."""
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim > 1:
                parameter.copy_(rounded(parameter.float()))
    return copy
