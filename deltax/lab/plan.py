"""What a comparison will do, what it could see and how long it will take: settled before any compute is spent."""

import hashlib
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from deltax.errors import UserError, nearest
from deltax.expression import recipe as read
from deltax.lab import measure
from deltax.lab.statistics import LOOKS, SMOKE_PAIRS, detectable, look_level
from deltax.lab.store import Store
from deltax.recipe import Part, diff
from deltax.train.job import code_version, fingerprint, loop_of, task_of
from deltax.train.machine import Machine

TUNING_SEED = 0
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
CHECKS = (0.5, 1.0, 2.0)  # of X's best rate, at each rung of the ladder
RUNGS = (0.5, 2.0)
LADDER_SEEDS = 3
STARTING = 5.0  # seconds until workers train
PILOT = 0.06  # sd of ln CEG from pair to pair in a pilot of 67 runs: 0.0136 nats over 0.23 nats per e-fold

Switch = Literal["on", "off"]


@dataclass(frozen=True)
class Effort:
    """Pairs, and a run's share of the steps that the first recipe declares."""

    pairs: int
    share: float


EFFORTS = {
    "smoke": Effort(SMOKE_PAIRS, 1 / 8),
    "quick": Effort(5, 1 / 6),
    "solid": Effort(8, 1),
    "claim": Effort(12, 2),
}


@dataclass(frozen=True)
class Budget:
    """What each run may spend on training, the same for every arm. `asked` is how the user wrote it."""

    asked: str
    amount: float
    unit: Literal["flops", "tokens"]

    def steps(self, flops_per_step: float, tokens_per_step: float) -> int:
        return max(1, round(self.amount / (flops_per_step if self.unit == "flops" else tokens_per_step)))

    def __str__(self) -> str:
        return f"{self.amount:.3g} training FLOPs" if self.unit == "flops" else f"{self.amount:.3g} training tokens"


@dataclass(frozen=True)
class Arm:
    """One recipe of a comparison, with the steps that the budget buys it."""

    name: str
    recipe: Part
    flops_per_step: int
    tokens_per_step: int
    steps: int

    @property
    def flops(self) -> int:
        return self.steps * self.flops_per_step

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Noise:
    """The sd of ln CEG from pair to pair that a resolution rests on, and whose noise it is."""

    sd: float
    source: str


@dataclass(frozen=True)
class Calibration:
    """One worker's speed on X just now, seconds, and the machine's load average at that time."""

    step: float
    evaluation: float
    load: float

    @property
    def warning(self) -> str | None:
        cores = os.cpu_count() or 1  # the load is all of the machine's
        if self.load <= 0.5 * cores:
            return None
        return (
            f"the load average is {self.load:.1f} on {cores} cores: times and speeds will be off, "
            "losses and verdicts will not"
        )


@dataclass(frozen=True)
class Plan:
    """A comparison before it is run. The first arm is X; `looks` are the numbers of pairs at which it is judged."""

    arms: tuple[Arm, ...]
    budget: Budget
    looks: tuple[int, ...]
    ladder: Switch
    noise: Noise
    calibration: Calibration
    workers: int

    @property
    def x(self) -> Arm:
        return self.arms[0]

    @property
    def pairs(self) -> int:
        return self.looks[-1]

    def level(self, look: int) -> float:
        return look_level(look) if len(self.looks) > 1 else 0.95

    @property
    def unit(self) -> str:
        return task_of(self.x.recipe).unit

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps of X at each rung of the ladder besides B; none when it is off."""
        if self.ladder == "off":
            return ()
        return tuple(max(1, round(self.x.steps * rung)) for rung in RUNGS)

    @property
    def id(self) -> str:
        """Equal for comparisons that must come out the same; what `dx report` calls them by."""
        arms = [f"{a.name} {a.recipe.id} {code_version(a.recipe)} {a.steps}" for a in self.arms]
        content = " | ".join([*arms, fingerprint(self.x.recipe), str(self.looks), self.ladder, precision()])
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    @cached_property
    def scale(self) -> str:
        return measure.scale(self.x.recipe, self.x.steps)

    def runs(self) -> dict[str, int]:
        """How many of what, at most, short of strips that must be extended."""
        counted = {"tuning": len(self.arms) * len(FACTORS), "scoring": len(self.arms) * self.pairs}
        if self.rungs:
            counted["ladder"] = len(self.rungs) * (len(CHECKS) + min(LADDER_SEEDS, self.looks[0]))
        return counted

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs."""
        each = len(CHECKS) + min(LADDER_SEEDS, self.looks[0])
        return (len(FACTORS) + self.pairs) * sum(a.steps for a in self.arms) + each * sum(self.rungs)

    @property
    def seconds(self) -> float:
        """X's time for every step, an evaluation for every run; workers go side by side, and start four times."""
        work = self.steps * self.calibration.step + sum(self.runs().values()) * self.calibration.evaluation
        return work / self.workers + 4 * STARTING

    def resolution(self, pairs: int) -> float:
        """The smallest gain, as a ratio, that so many pairs would find with 80 % power against Holm's hardest level."""
        level = look_level(pairs) if len(self.looks) > 1 and pairs in LOOKS else 0.95
        strict = 1 - (1 - level) / max(1, len(self.arms) - 1)
        return math.exp(detectable(self.noise.sd, pairs, level=strict))

    def announcement(self) -> dict[str, Any]:
        """What the pages need to tell this comparison's runs from others, while they go on."""
        steps = lambda arm: [arm.steps, *(self.rungs if arm is self.x else ())]
        arms = [{"name": a.name, "title": a.recipe.title, "steps": steps(a)} for a in self.arms]
        return {"plan": self.id, "scale": self.scale, "runs": sum(self.runs().values()), "arms": arms}

    def sentences(self) -> list[str]:
        """The plan as it is printed before the first run."""
        x, names = self.x, " and ".join(a.name for a in self.arms[1:])
        runs = self.runs()
        parts = ", ".join(f"{count} {what}" for what, count in runs.items())
        said = [
            f"{x.name} against {names}, at {self.scale}",
            self._seen(),
            f"each run spends {self.budget}, {x.steps} steps of {x.name}, whichever recipe it trains",
            f"{sum(runs.values())} runs ({parts}), {_minutes(self.seconds)} on {self.workers} at a time "
            f"({self.calibration.step:.2g} s a step just now)",
        ]
        return [*said, *([self.calibration.warning] if self.calibration.warning else [])]

    def _seen(self) -> str:
        see = lambda pairs: f"{100 * (self.resolution(pairs) - 1):.2g} %"
        if self.pairs <= SMOKE_PAIRS:
            return f"a smoke test: {self.pairs} pairs give no verdict; 5 would see a gain of {see(5)}"
        more = f"; 12 pairs would see {see(12)}" if self.pairs < 12 else ""
        at = " or ".join(map(str, self.looks)) if len(self.looks) > 1 else self.pairs
        return (
            f"with {at} pairs you can see a gain of ≥ {see(self.pairs)}; smaller will read inconclusive{more} "
            f"(noise of {self.noise.source})"
        )


def make_plan(
    recipes: Sequence[Part],
    store: Store,
    *,
    budget: str = "quick",
    pairs: int | Literal["until-clear"] | None = None,
    ladder: Switch = "on",
    workers: int = 2,
) -> Plan:
    """The plan of a comparison of the first recipe with the others; see `deltax.lab.compare.compare`.

    Raises UserError for fewer than two recipes, recipes on different data, and words it does not know.
    """
    if len(recipes) < 2:
        raise UserError("a comparison takes at least two recipes, as in 'dx compare gpt gpt+dyt'")
    if ladder not in ("on", "off"):
        raise UserError(f"a ladder is on or off, not {ladder!r}")
    x = recipes[0]
    for other in recipes[1:]:
        if fingerprint(other) != fingerprint(x) or task_of(other).unit != task_of(x).unit:
            raise UserError(f"{x.title} and {other.title} are scored on different data; compare recipes of one task")
    calibration = calibrate(x)
    frozen = freeze(budget, x, calibration, store)
    arms = [_arm(recipe, name, frozen, store) for recipe, name in zip(recipes, _names(recipes), strict=True)]
    looks = _looks(pairs, budget)
    return Plan(tuple(arms), frozen, looks, ladder, _noise(store, arms[0]), calibration, max(1, workers))


def freeze(asked: str, x: Part, calibration: Calibration, store: Store) -> Budget:
    """A budget as it is written, as FLOPs or tokens. Seconds are converted once on each machine and remembered."""
    flops = _flops(x, store)
    if asked in EFFORTS:
        return Budget(asked, flops * max(1, round(loop_of(x).steps * EFFORTS[asked].share)), "flops")
    amount, unit = _read(asked)
    if unit != "seconds":
        return Budget(asked, amount, unit)
    key = f"{asked} {x.id} {code_version(x)} {Machine.here().describe()}"
    known = store.recall("budget", key)
    if known is None:
        known = float(f"{flops * amount / calibration.step:.2g}")
        store.remember("budget", key, known)
    return Budget(asked, known, "flops")


def calibrate(x: Part, machine: Machine | None = None) -> Calibration:
    """Time a few steps of X. An evaluation is taken for a third of a step for each example: it has no backward."""
    load = os.getloadavg()[0]
    stepper = measure.Stepper(x, machine or Machine.here())
    stepper()
    step = min(stepper.timed(1) for _ in range(3))
    examples = len(task_of(x).held_out_documents("validation"))
    return Calibration(step, step / 3 * examples / loop_of(x).batch, load)


def pair_seeds(count: int) -> range:
    """The seeds that are scored; the tuning seed is not among them."""
    return range(TUNING_SEED + 1, TUNING_SEED + 1 + count)


def precision() -> str:
    """What runs on this machine compute in, as a job states it."""
    return Machine.here().precision_name


def command(plan: Plan) -> str:
    """The line that runs this comparison again."""
    words = ["dx", "compare", *(a.recipe.title for a in plan.arms), "--budget", plan.budget.asked]
    if len(plan.looks) > 1:
        words += ["--until-clear"]
    elif plan.budget.asked not in EFFORTS or EFFORTS[plan.budget.asked].pairs != plan.pairs:
        words += ["--pairs", str(plan.pairs)]
    source = dict(plan.x.recipe["task"].kwargs).get("source")
    words += ["--data", source] if source else []
    for path, value in _settings(plan.x.recipe):
        words += ["--set", f"{path}={value}"]
    words += ["--ladder", "off"] if plan.ladder == "off" else []
    return shlex.join(words)


def _settings(x: Part) -> list[tuple[str, str]]:
    """The leaves at which a recipe is not what its title says, the text apart."""
    try:
        said = read(x.title)
        if source := dict(x["task"].kwargs).get("source"):
            said = said.put("task.source", source)
    except UserError:
        return []
    is_leaf = lambda path: not isinstance(x[path], Part)
    return [(path, value) for path, _, value in diff(said, x) if value not in ("None", "absent") and is_leaf(path)]


def _read(asked: str) -> tuple[float, str]:
    form = r"\s*(\d+\.?\d*(?:e[+-]?\d+)?)\s*(?:(s|sec|seconds|min|minutes|h|hours)|([kmgbt]?)\s*(flops?|tokens?))\s*"
    matched = re.fullmatch(form, asked, re.IGNORECASE)
    amount = float(matched[1]) if matched else 0.0
    if not matched or not amount:
        known = f"write {', '.join(EFFORTS)}, 60s, 2e12flops or 300k tokens"
        raise UserError(f"cannot read the budget {asked!r}{nearest(asked, EFFORTS) or ':'} {known}")
    if matched[2]:
        return amount * {"s": 1, "m": 60, "h": 3600}[matched[2][0].lower()], "seconds"
    size = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}[matched[3].lower()]
    return amount * size, "flops" if matched[4].lower().startswith("flop") else "tokens"


def _looks(pairs: int | str | None, budget: str) -> tuple[int, ...]:
    if pairs == "until-clear":
        return tuple(LOOKS)
    count = pairs if pairs is not None else EFFORTS[budget].pairs if budget in EFFORTS else EFFORTS["quick"].pairs
    if type(count) is not int or count < 2:
        raise UserError(f"a comparison takes 2 or more pairs, or 'until-clear', not {count!r}")
    return (count,)


def _arm(recipe: Part, name: str, budget: Budget, store: Store) -> Arm:
    flops, tokens = _flops(recipe, store), measure.tokens_per_step(recipe)
    if budget.unit == "flops" and not flops:
        raise UserError(f"a step of {recipe.title} has no matrix products to count; give the budget in tokens")
    step = flops if budget.unit == "flops" else tokens
    if budget.amount < step / 2:
        raise UserError(f"a budget of {budget} buys no step of {recipe.title}, which takes {step:.3g}: give more")
    return Arm(name, recipe, flops, tokens, budget.steps(flops, tokens))


def _flops(recipe: Part, store: Store) -> int:
    key = f"{recipe.id} {code_version(recipe)} {fingerprint(recipe)}"
    known = store.recall("flops", key)
    if known is None:
        known = measure.flops_per_step(recipe)
        store.remember("flops", key, known)
    return known


def _names(recipes: Sequence[Part]) -> list[str]:
    """Titles; recipes that differ but share one are told apart by their ids, and equal ones by a number."""
    names: list[str] = []
    for recipe in recipes:
        alike = [other for other in recipes if other.title == recipe.title]
        name = recipe.title if all(other == recipe for other in alike) else f"{recipe.title} #{recipe.id[:6]}"
        again = sum(old == name or old.startswith(f"{name} (") for old in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _noise(store: Store, x: Arm) -> Noise:
    """Pooled over earlier comparisons on this data within a factor 2 of this budget, else the pilot's."""
    near = [
        entry
        for entry in store.records("noise").values()
        if entry["data"] == fingerprint(x.recipe) and 0.5 <= entry["flops"] / x.flops <= 2 and entry["sd"] > 0
    ]
    if not near:
        return Noise(PILOT, "a pilot of 67 small runs; this machine's own will replace it")
    sd = math.sqrt(np.average([e["sd"] ** 2 for e in near], weights=[e["df"] for e in near]))
    return Noise(sd, f"{len(near)} earlier comparison{'s' if len(near) > 1 else ''} on this data")


def _minutes(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
