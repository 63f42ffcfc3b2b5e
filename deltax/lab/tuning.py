"""Tuning, the same for every arm: one strip of rates each, on a seed that is never scored (PROTOCOL.md A.1)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from deltax.lab.plan import CHECKS, FACTORS, TUNING_SEED, Arm, precision
from deltax.lab.rates import BestRate, Edge, best_rate
from deltax.lab.store import Result
from deltax.recipe import Part
from deltax.train.job import Job

EXTENSIONS = 3


class Runs:
    """Results of jobs, had from `execute`, a function of jobs to results by id, as they are needed."""

    def __init__(self, execute: Callable[[list[Job]], dict[str, Result]]):
        self._execute = execute
        self._results: dict[Job, Result] = {}

    def need(self, jobs: Iterable[Job]) -> None:
        """Have all of these, the longest first, so that no worker ends with a long one alone."""
        missing = sorted({job for job in jobs if job not in self._results}, key=lambda job: (-job.steps, job.id))
        if missing:
            found = self._execute(missing)
            self._results |= {job: found[job.id] for job in missing}

    def __getitem__(self, job: Job) -> Result:
        if job not in self._results:
            self.need([job])
        return self._results[job]

    def score(self, job: Job) -> float:
        """NaN for a run that diverged."""
        result = self[job]
        return math.nan if result.diverged or result.score is None else result.score

    def __iter__(self) -> Iterator[Job]:
        return iter(self._results)


@dataclass(frozen=True)
class Sweep:
    """One seed's loss at each factor of a knob, NaN where it diverged, and the best factor."""

    factors: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> BestRate:
        return best_rate(self.factors, self.losses)

    @property
    def factor(self) -> float:
        """The optimum to three digits, so that rounding elsewhere does not make another run of it."""
        return float(f"{self.best.factor:.3g}")

    @property
    def diverged(self) -> int:
        return sum(not math.isfinite(loss) for loss in self.losses)


@dataclass(frozen=True)
class Tuned:
    """An arm at its best: `lr_scale` is a factor on the declared one, `sweep` how it was found.

    `knob` names the optimizer's argument that `second` is the strip of, where one is declared.
    """

    arm: Arm
    lr_scale: float
    sweep: Sweep
    knob: str | None = None
    second: Sweep | None = None

    def job(self, seed: int, *, steps: int | None = None, lr_scale: float | None = None) -> Job:
        return Job(self.arm.recipe, seed, steps or self.arm.steps, lr_scale or self.lr_scale, precision())


def tune(arms: Sequence[Arm], runs: Runs) -> list[Tuned]:
    """Every arm's best rate. A strip whose best lies on its edge has all strips extended by a factor 2 on that side, at
    most three times, so that each arm is always given the same runs.

    Where an optimizer declares a second knob, all arms get three more runs: that arm at half, once and twice the knob,
    any other at three rates about its best.
    """
    factors = FACTORS
    for left in range(EXTENSIONS, -1, -1):
        runs.need(_job(arm, factor) for arm in arms for factor in factors)
        sweeps = [_sweep(arm, factors, runs) for arm in arms]
        edges = {sweep.best.at_edge for sweep in sweeps}
        low = (factors[0] / 2,) if Edge.LOW in edges else ()
        high = (factors[-1] * 2,) if Edge.HIGH in edges else ()
        if not (low or high) or not left:
            break
        factors = low + factors + high
    tuned = [Tuned(arm, sweep.factor, sweep) for arm, sweep in zip(arms, sweeps, strict=True)]
    knobs = [second_knob(arm.recipe) for arm in arms]
    return [_refine(t, knob, runs) for t, knob in zip(tuned, knobs, strict=True)] if any(knobs) else tuned


def second_knob(recipe: Part) -> str | None:
    """The optimizer argument to tune besides the rate: what the optimizer's function names as its `second_knob`."""
    return getattr(recipe["optimizer"].target, "second_knob", None)


def checks(tuned: Tuned, steps: int) -> list[Job]:
    """X at half, once and twice its best rate, for another budget."""
    return [tuned.job(TUNING_SEED, steps=steps, lr_scale=tuned.lr_scale * factor) for factor in CHECKS]


def check(tuned: Tuned, steps: int, runs: Runs) -> Sweep:
    jobs = checks(tuned, steps)
    return Sweep(tuple(job.lr_scale for job in jobs), tuple(runs.score(job) for job in jobs))


def _job(arm: Arm, factor: float) -> Job:
    return Job(arm.recipe, TUNING_SEED, arm.steps, factor, precision())


def _sweep(arm: Arm, factors: Sequence[float], runs: Runs) -> Sweep:
    return Sweep(tuple(factors), tuple(runs.score(_job(arm, factor)) for factor in factors))


def _refine(tuned: Tuned, knob: str | None, runs: Runs) -> Tuned:
    if knob is None:
        around = tuple(float(f"{tuned.lr_scale * factor:.3g}") for factor in (math.sqrt(0.5), 1, math.sqrt(2)))
        runs.need(_job(tuned.arm, lr_scale) for lr_scale in around)
        return replace(tuned, lr_scale=_sweep(tuned.arm, around, runs).factor)
    path = f"optimizer.{knob}"
    declared = tuned.arm.recipe[path]
    turned = lambda factor: replace(tuned.arm, recipe=tuned.arm.recipe.put(path, declared * factor))
    runs.need(_job(turned(factor), tuned.lr_scale) for factor in CHECKS)
    sweep = Sweep(CHECKS, tuple(runs.score(_job(turned(factor), tuned.lr_scale)) for factor in CHECKS))
    return replace(tuned, arm=turned(sweep.factor), knob=knob, second=sweep)
