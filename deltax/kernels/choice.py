"""Which attention kernel computes, for a device, shapes and rules, and why.

A short table decides, the same on every run; `timed` measures the kernels on given arguments instead and is remembered
for their shapes. The table's line between Triton and SDPA with a bias is reckoned from what each moves, not measured.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from deltax.kernels.attention import sdpa
from deltax.kernels.twins import twin
from deltax.papers.language.attention.softmax_attention import attend
from deltax.parts.attention.scores import Rules
from deltax.recipe import Part
from deltax.shapes import Heads, Keys, Queries, Values

LARGE = 512 * 512  # scores of a head from which a bias for each costs more than scoring it on chip


class Choice(NamedTuple):
    """A kernel, the name it goes by, and why it was chosen."""

    name: str
    kernel: Callable[..., Heads]
    why: str


_picked: dict[Hashable, Choice] = {}
_timed: dict[Hashable, Choice] = {}


@twin(
    "papers.softmax_attention:attend",
    on="cuda",
    why="chosen for each shape when it is called: see deltax.kernels.choice.picked",
)
def auto(q: Queries, k: Keys, v: Values, rules: Rules | None = None) -> Heads:
    """`attend` by the kernel that `choose` names for these arguments. Shapes and gradients are those of `attend`."""
    return choose(q, k, v, rules).kernel(q, k, v, rules or Rules())


auto.reference = attend


def choose(q: Queries, k: Keys, v: Values, rules: Rules | None = None) -> Choice:
    """The kernel for these arguments: as `timed` found, where it has seen the like; else as the table has it."""
    rules = rules or Rules()
    key = _key(q, k, rules)
    if key in _timed:
        return _picked.setdefault(key, _timed[key])
    if key not in _picked:
        _picked[key] = _by_table(q, k, v, rules)
    return _picked[key]


def picked() -> list[str]:
    """What was chosen so far in this process, a line for each kind of arguments."""
    return [f"{_said(key)}: {choice.name}, {choice.why}" for key, choice in _picked.items()]


def timed(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, rounds: int = 7) -> Choice:
    """Time every kernel that takes these arguments, forward, and backward where a gradient is asked for.

    In turns, `rounds` of them after one to warm up; the least median is chosen for such arguments from now on.
    """
    rules = rules or Rules()
    kernels = candidates(q, k, v, rules)
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(rounds + 1):
        for name, kernel in kernels.items():
            started = _now(q.device)
            out = kernel(q, k, v, rules)
            if out.requires_grad:
                torch.autograd.grad(out.sum(), [t for t in (q, k, v) if t.requires_grad])
            if turn:
                seconds[name].append(_now(q.device) - started)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    others = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in medians.items() if name != best)
    why = f"timed: {1e3 * medians[best]:.3g} ms" + (f" against {others}" if others else "")
    key = _key(q, k, rules)
    _timed[key] = _picked[key] = Choice(best, kernels[best], why)
    return _timed[key]


def candidates(q: Queries, k: Keys, v: Values, rules: Rules) -> dict[str, Callable[..., Heads]]:
    """Every kernel that computes these arguments here without handing them to another, by name."""
    found: dict[str, Callable[..., Heads]] = {"attend": attend}
    if rules.is_additive:
        found["sdpa"] = sdpa
    if q.device.type == "cuda" and has_triton():
        from deltax.kernels import triton_attention

        if not triton_attention.unfit(q, k, v, rules):
            found["triton"] = triton_attention.flash
    return found


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _by_table(q: Queries, k: Keys, v: Values, rules: Rules) -> Choice:
    if not rules.is_additive:
        return Choice("attend", attend, "the score is no bias, which the fused kernels ask for")
    kernels = candidates(q, k, v, rules)
    of_torch = lambda why: Choice("sdpa", sdpa, why)
    if q.device.type != "cuda":
        return of_torch(f"torch's fused kernel; Triton kernels do not run on {q.device.type}")
    if rules.is_plain and (rules.is_everywhere or (rules.is_causal and q.shape[1] == k.shape[1])):
        return of_torch("torch's fused kernels take this mask as it is")
    if "triton" not in kernels:
        return of_torch("the Triton kernel does not take these arguments, or Triton is not installed")
    if q.element_size() > 2:
        return of_torch(f"in {str(q.dtype).removeprefix('torch.')} Triton's products would not use the matrix units")
    if q.shape[1] * k.shape[1] < LARGE:
        return of_torch("a bias for so few scores is cheap")
    return Choice("triton", kernels["triton"], "torch would write and read a bias for every score")


def _key(q: Queries, k: Keys, rules: Rules) -> Hashable:
    lengths = tuple(1 << (n - 1).bit_length() for n in (q.shape[1], k.shape[1]))
    made = tuple(part.target if isinstance(part, Part) else type(part) for part in (rules.score, rules.mask))
    kinds = rules.is_plain, rules.is_per_example, rules.is_additive, rules.is_causal, rules.is_everywhere
    exact = q.shape[1] == k.shape[1]
    return (q.device.type, q.dtype, q.shape[0], *lengths, exact, q.shape[2], k.shape[2], q.shape[3], made, kinds)


def _said(key: Any) -> str:
    device, dtype, batch, queries, keys, _, heads, groups, width, made, _ = key
    rules = "+".join(getattr(m, "__name__", str(m)) for m in made)
    shape = f"{batch} x up to {queries} queries and {keys} keys, {heads} heads on {groups} of {width}"
    return f"{device} {str(dtype).removeprefix('torch.')}, {shape}, {rules}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
