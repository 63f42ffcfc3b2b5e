"""A fair experiment between recipes (PROTOCOL.md A): tuned alike, paired, judged by intervals.

    comparison = compare("gpt", "gpt+dyt")
    comparison.rows[1].against.gains["flop"]     1.03 [0.97, 1.10]

Everything is derived from stored runs, so the same comparison again trains nothing.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from deltax import __version__
from deltax.expression import recipe as read
from deltax.lab import measure
from deltax.lab.comparison import Against, Comparison, Row, curve, sweep_json
from deltax.lab.engine import execute
from deltax.lab.gain import ComputeLadder, Gain, Ratio, exactly, gain, speed_ratio
from deltax.lab.plan import LADDER_SEEDS, Arm, Plan, Switch, make_plan, pair_seeds
from deltax.lab.rates import depends_on_rate
from deltax.lab.statistics import (
    Difference,
    Interval,
    Outcome,
    detectable,
    differences,
    equivalence_margin,
    evaluation_se,
    holm,
    paired,
    t_quantile,
    verdicts,
)
from deltax.lab.store import Store
from deltax.lab.tuning import Runs, Sweep, Tuned, check, checks, tune
from deltax.recipe import Part
from deltax.train.job import Job, code_version, fingerprint
from deltax.train.machine import Machine, cores


def compare(
    *recipes: str | Part,
    budget: str = "quick",
    pairs: int | Literal["until-clear"] | None = None,
    ladder: Switch = "on",
    data: str | None = None,
    store: Store | None = None,
    engine: str = "local",
    workers: int | None = None,
    on_event: Callable[[Any], None] = lambda event: None,
) -> Comparison:
    """Compare recipes, the first with each of the others, at one training budget.

    recipes   as written at the shell, or values
    budget    "smoke", "quick", "solid", "claim"; or a run's "60s", "2e12flops", "300k tokens"
    pairs     scored runs of each recipe: 3, 5, 8 or 12 by the budget's name; "until-clear" looks at 4, 8 and 12
    ladder    "off" leaves out X at half and twice the budget, and with it all compute-equivalent gains
    data      a file, a folder or hf:NAME in place of the recipes' own text
    store     where runs are kept and found; the usual place by default
    on_event  told the `Plan` first, then the engine's events

    Raises UserError for what cannot be compared; nothing has been trained then.
    """
    parts = [read(r) if isinstance(r, str) else r for r in recipes]
    if data is not None:
        parts = [part.put("task.source", data) for part in parts]
    store = store or Store()
    workers = workers or len(cores())
    plan = make_plan(parts, store, budget=budget, pairs=pairs, ladder=ladder, workers=workers)
    on_event(plan)
    runs = Runs(lambda jobs: execute(jobs, store=store, engine=engine, workers=workers, on_event=on_event))
    known = store.recall("comparison", plan.id)
    with nullcontext() if known else store.announced("comparing", plan.announcement()):
        comparison = _carry_out(plan, runs, store)
        _remember(store, comparison)
    return comparison


def _carry_out(plan: Plan, runs: Runs, store: Store) -> Comparison:
    tuned = tune(plan.arms, runs)
    tuning = set(runs)
    ladder_found = None
    for look in plan.looks:
        scored = [[t.job(seed) for seed in pair_seeds(look)] for t in tuned]
        rungs = [job for steps in plan.rungs for job in checks(tuned[0], steps)]
        runs.need([*rungs, *(job for jobs in scored for job in jobs)])
        ladder_found = ladder_found or _ladder(plan, tuned[0], runs)
        against = _judge(plan, tuned, scored, ladder_found, runs)
        if all(_clear(found) for found in against):
            break
    seconds = _seconds(plan.arms, store)
    costs = [_cost(arm.recipe, store) for arm in plan.arms]
    rows = [
        Row(
            tuned=t,
            scores=tuple(runs.score(job) for job in jobs),
            curve=curve([runs[job].losses for job in jobs], t.arm.tokens_per_step),
            cost=costs[i],
            tokens_per_second=t.arm.tokens_per_step / float(np.median(seconds[i])),
            against=None,
        )
        for i, (t, jobs) in enumerate(zip(tuned, scored, strict=True))
    ]
    rows[1:] = [
        replace(row, against=replace(found, gains=_gains(found, rows[0], row, seconds[0], seconds[i + 1], plan)))
        for i, (row, found) in enumerate(zip(rows[1:], against, strict=True))
    ]
    return Comparison(
        plan=plan,
        rows=tuple(rows),
        ladder=_ladder_json(plan, tuned[0], ladder_found, runs),
        spent=_spent(plan, runs, tuning, scored),
        environment=_environment(plan),
        earlier=_earlier(store, plan),
        pictures={
            t.arm.name: drawn for t, jobs in zip(tuned, scored, strict=True) if (drawn := runs[jobs[0]].pictures)
        },
    )


def _judge(
    plan: Plan, tuned: Sequence[Tuned], scored: Sequence[Sequence[Job]], ladder: ComputeLadder | str, runs: Runs
) -> list[Against]:
    """Each Y against X at the pairs scored so far; `gains` holds the raw one, under "budget"."""
    x_jobs, level = scored[0], plan.level(len(scored[0]))
    found, gains = [], []
    for jobs in scored[1:]:
        d = differences([runs.score(j) for j in x_jobs], [runs.score(j) for j in jobs])
        error = _evaluation_se(x_jobs, jobs, runs) if np.isfinite(d).all() else 0.0
        found.append(paired(d, level, evaluation_se=error))
        gains.append(_widened(gain(d, ladder, level), found[-1]) if isinstance(ladder, ComputeLadder) else None)
    slopes = [g.slope if g and g.slope < 0 else 0.0 for g in gains]
    verdict = verdicts(found, [equivalence_margin(d, slope) for d, slope in zip(found, slopes, strict=True)])
    adjusted = holm([d.verdict_p for d in found])
    strict = 1 - (1 - level) / len(found)
    return [
        Against(
            difference=d,
            adjusted_p=float(adjusted[i]),
            verdict=verdict[i],
            detectable=_detectable(d, strict),
            gains={"budget": gains[i]} if gains[i] else {},
            shared=_shared(tuned[0].sweep, tuned[i + 1].sweep),
            flips=depends_on_rate(tuned[0].sweep.losses, tuned[i + 1].sweep.losses),
        )
        for i, d in enumerate(found)
    ]


def _evaluation_se(x_jobs: Sequence[Job], y_jobs: Sequence[Job], runs: Runs) -> float:
    """Over documents, in the task's unit; 0 where the task has fewer than two."""
    first = runs[x_jobs[0]]
    if len(np.unique(first.clusters)) < 2:
        return 0.0
    each = [np.stack([runs[j].values * first.weights for j in jobs]) for jobs in (x_jobs, y_jobs)]
    return evaluation_se(*each, first.clusters, first.weights)


def _detectable(d: Difference, level: float) -> float:
    if d.diverged:
        return math.inf
    return detectable(math.sqrt(d.sd**2 + d.n * d.evaluation_se**2), d.n, level=level, df=d.df)


def _widened(found: Gain, d: Difference) -> Gain:
    """The gain with the evaluation's error in its interval, as a factor of 1 known to exp(±t se / slope)."""
    if not d.evaluation_se or not found.slope < 0:
        return found
    half = float(t_quantile(d.interval.level, d.df)) * d.evaluation_se / -found.slope
    spread = Interval(math.exp(-half), math.exp(half), d.interval.level)
    return replace(found.times(Ratio(1.0, spread, "evaluation")), low=found.low, high=found.high)


def _gains(found: Against, x: Row, y: Row, x_seconds: np.ndarray, y_seconds: np.ndarray, plan: Plan) -> dict[str, Gain]:
    """Per token, FLOP and second: what X would spend to meet Y, over what Y spent."""
    if "budget" not in found.gains:
        return {}
    raw, a, b = found.gains["budget"], x.tuned.arm, y.tuned.arm
    gains = {"token": raw.times(exactly(a.tokens / b.tokens))}
    if a.flops and b.flops:
        gains["flop"] = raw.times(exactly(a.flops / b.flops))
    gains["second"] = raw.times(speed_ratio(x_seconds * a.steps, y_seconds * b.steps))
    return gains


def _clear(found: Against) -> bool:
    """Better, worse, or equivalent by the narrow margin: one that had to be widened asks for more pairs."""
    match found.verdict.outcome:
        case Outcome.EQUIVALENT:
            return found.verdict.margin > found.difference.detectable
        case outcome:
            return outcome in (Outcome.BETTER, Outcome.WORSE)


def _shared(x: Sweep, y: Sweep) -> tuple[float, float]:
    """Y - X on the tuning seed at X's best factor of the strip."""
    at = min(range(len(x.losses)), key=lambda i: x.losses[i] if math.isfinite(x.losses[i]) else math.inf)
    return x.factors[at], float(differences([x.losses[at]], [y.losses[at]])[0])


def _ladder(plan: Plan, x: Tuned, runs: Runs) -> ComputeLadder | str:
    """X at each rung, its own full schedule and rate, on the first pairs' seeds; or why there is none."""
    if not plan.rungs:
        return "switched off"
    seeds = pair_seeds(min(LADDER_SEEDS, plan.looks[0]))
    rates = {steps: check(x, steps, runs).factor for steps in plan.rungs}
    jobs = [[x.job(seed, steps=steps, lr_scale=lr_scale) for steps, lr_scale in rates.items()] for seed in seeds]
    runs.need(job for row in jobs for job in row)
    budgets = sorted({1.0, *(steps / x.arm.steps for steps in plan.rungs)})
    losses = []
    for seed, row in zip(seeds, jobs, strict=True):
        at = {job.steps / x.arm.steps: runs.score(job) for job in row} | {1.0: runs.score(x.job(seed))}
        losses.append([at[budget] for budget in budgets])
    if len(seeds) < 2:
        return "it needs at least 2 pairs"
    if not np.isfinite(losses).all():
        return f"{x.arm.name} diverged on it"
    return ComputeLadder(budgets, losses, tuple(range(len(seeds))))


def _ladder_json(plan: Plan, x: Tuned, ladder: ComputeLadder | str | None, runs: Runs) -> dict[str, Any]:
    if not isinstance(ladder, ComputeLadder):
        return {"missing": ladder}
    sweeps = {steps: sweep_json(check(x, steps, runs)) for steps in plan.rungs}
    return {"budgets": ladder.budgets, "losses": ladder.losses, "strips": sweeps}


def _seconds(arms: Sequence[Arm], store: Store) -> np.ndarray:
    """Seconds a step of each arm over interleaved blocks, (arms, blocks); measured once on each machine."""
    key = " ".join([*(f"{a.recipe.id} {code_version(a.recipe)}" for a in arms), str(Machine.here().describe())])
    known = store.recall("speed", key)
    if known is None:
        known = measure.speed([a.recipe for a in arms]).seconds.tolist()
        store.remember("speed", key, known)
    return np.array(known)


def _cost(recipe: Part, store: Store) -> measure.Cost:
    key = f"{recipe.id} {code_version(recipe)} {fingerprint(recipe)} {Machine.here().describe()}"
    known = store.recall("cost", key)
    if known is None:
        known = measure.cost(recipe).to_json()
        store.remember("cost", key, known)
    return measure.Cost(**known)


def _spent(plan: Plan, runs: Runs, tuning: set[Job], scored: Sequence[Sequence[Job]]) -> dict[str, Any]:
    """Runs, training FLOPs and seconds of each phase. Every run is counted once, also one that the store had."""
    # A second knob changes the tree and not its title.
    per_step = {known: arm.flops_per_step for arm in plan.arms for known in (arm.recipe.title, arm.recipe.id)}
    of_pairs = {job for jobs in scored for job in jobs}
    spent: dict[str, dict[str, float]] = {}
    for job in runs:
        phase = "tuning" if job in tuning else "scoring" if job in of_pairs else "ladder"
        entry = spent.setdefault(phase, {"runs": 0, "flops": 0, "seconds": 0.0})
        entry["runs"] += 1
        entry["flops"] += len(runs[job].losses) * per_step.get(job.recipe.id, per_step[job.recipe.title])
        entry["seconds"] += runs[job].seconds
    return spent


def _environment(plan: Plan) -> dict[str, Any]:
    load = round(plan.calibration.load, 1)
    return {**Machine.here().describe(), "deltax": __version__, "workers": plan.workers, "load average": load}


def _earlier(store: Store, plan: Plan) -> int:
    """Other comparisons that were scored on this evaluation data."""
    data = fingerprint(plan.x.recipe)
    return len({e["of"] for e in store.records("noise").values() if e["data"] == data and e["of"] != plan.id})


def _remember(store: Store, comparison: Comparison) -> None:
    """The comparison, and what each Y adds to the ledger of noise, unless the store has them: it may be read-only."""
    plan, record = comparison.plan, comparison.to_json()
    if (store.recall("comparison", plan.id) or {}).keys() == record.keys():
        return
    store.remember("comparison", plan.id, record)
    for row in comparison.rows[1:]:
        d = row.against.difference
        slope = row.against.gains["token"].slope if "token" in row.against.gains else math.nan
        entry = {"of": plan.id, "data": fingerprint(plan.x.recipe), "flops": plan.x.flops, "df": d.n - 1}
        entry["sd"] = d.sd / -slope if slope < 0 and not d.diverged else 0.0
        store.remember("noise", f"{plan.id} / {row.name}", entry)
