"""The lab that a measured claim is handed: trains, compares, times, and says what it came to."""

import hashlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltax import kernels
from deltax.claim import Outcome, Verdict
from deltax.errors import UserError
from deltax.expression import recipe as read
from deltax.lab.engine import execute
from deltax.lab.gain import speed_ratio
from deltax.lab.plan import TUNING_SEED
from deltax.lab.statistics import Better, Interval, detectable, paired, verdict
from deltax.lab.statistics import Outcome as Judged
from deltax.lab.store import Result, Store
from deltax.recipe import Part
from deltax.tasks.evaluation import Evaluation
from deltax.train import checkpoint
from deltax.train.job import Job, fingerprint, loop_of, task_of
from deltax.train.loop import build

FIRST_SEED = 1000  # no rate is ever tuned on seeds from here on
DRAWING = {"svg.hashsalt": "deltax", "svg.fonttype": "none"}


@dataclass(frozen=True)
class Ratio(Interval):
    """A ratio of two times, slow over fast, with its interval."""

    value: float


class Trained:
    """A finished run with its weights."""

    def __init__(self, result: Result, store: Store):
        self.result, self._store = result, store

    @property
    def diverged(self) -> bool:
        return self.result.diverged

    @property
    def score(self) -> float:
        """Held-out, in the task's unit, lower is better; infinite when the run diverged."""
        return math.inf if self.result.score is None else self.result.score

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, nats) over training."""
        return self.result.losses

    @property
    def evaluation(self) -> Evaluation:
        r = self.result
        return Evaluation(self.score, r.values, r.weights, r.clusters, r.metrics)

    @property
    def task(self) -> Any:
        return task_of(self.result.job.recipe)

    @cached_property
    def model(self) -> nn.Module:
        """The trained model in evaluation mode. Raises UserError when the run diverged, or its weights are gone."""
        job = self.result.job
        if self.result.weights_file is None:
            gone = "they were not kept or are gone; 'dx train' with its recipe, seed and steps makes them"
            why = "the run diverged" if self.diverged else gone
            raise UserError(f"{job.recipe.title}, run {job.id[:10]}, has no weights: {why}")
        model = build(kernels.fastest(job.recipe, torch.device("cpu"))(), self.task, job.seed, job.recipe.title)
        model.load_state_dict(checkpoint.load(self.result.weights_file)[0])
        return model.eval()

    def score_at(self, **task_settings: Any) -> float:
        """The score of these weights on the same task with settings changed, such as context=512."""
        recipe = self.result.job.recipe
        for word, value in task_settings.items():
            recipe = recipe.put(f"task.{word}", value)
        if self.diverged:
            return math.inf
        key = f"{self.result.job.id} {fingerprint(recipe)} {sorted(task_settings.items())}"
        known = self._store.recall("score", key)
        if known is None:
            known = task_of(recipe).evaluate(self.model, recipe["objective"]).score
            self._store.remember("score", key, known)
        return known

    @torch.no_grad()
    def watch(self, module: nn.Module | str) -> tuple[Tensor, Tensor]:
        """What a submodule of `model` is given first, and what it gives, on all held-out data, along the first axis."""
        module = self.model.get_submodule(module) if isinstance(module, str) else module
        given, gave = [], []

        def keep(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            given.append(inputs[0].clone())
            gave.append(output.clone())

        hook = module.register_forward_hook(keep)
        try:
            self.task.evaluate(self.model, self.result.job.recipe["objective"])
        finally:
            hook.remove()
        if not given:
            raise UserError(f"the trained model does not use this {type(module).__name__}: watch a part of run.model")
        return torch.cat(given), torch.cat(gave)


class Lab:
    """Measurements for claims, every run of them kept in the store.

    engine, workers  for comparisons; single runs are trained in this process, or on the cluster
    on_event         told what the engines do
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        engine: str = "local",
        workers: int = 2,
        on_event: Callable[[Any], Any] = lambda event: None,
    ):
        self.store = store or Store()
        self.engine, self.workers, self.on_event = engine, workers, on_event
        self._scales: dict[str, int] = {}

    def anew(self) -> "Lab":
        """The same lab, with nothing measured yet that its verdicts would be the scale of."""
        return Lab(self.store, engine=self.engine, workers=self.workers, on_event=self.on_event)

    def seeds(self, n: int) -> range:
        """n seeds never used for tuning."""
        return range(FIRST_SEED, FIRST_SEED + n)

    def recipe(self, expression: str | Part) -> Part:
        return read(expression) if isinstance(expression, str) else expression

    def task(self, recipe: str | Part) -> Any:
        return task_of(self.recipe(recipe))

    def train(
        self,
        recipe: str | Part,
        *,
        seed: int,
        steps: int | None = None,
        lr_scale: float = 1.0,
        weights: dict[str, Tensor] | None = None,
    ) -> Trained:
        """Train to the end of the recipe's steps, or of `steps`, at a multiple `lr_scale` of its learning rate.

        weights  a state to start from instead of a fresh one
        """
        recipe = self.recipe(recipe)
        job = Job(recipe, seed, loop_of(recipe).steps if steps is None else steps, lr_scale)
        if weights is not None:
            job = replace(job, start=self._keep_start(weights))
        engine = "ray" if self.engine == "ray" else "inline"
        [result] = execute([job], store=self.store, engine=engine, on_event=self.on_event, keep_weights=True).values()
        self._scales[self.scale(recipe, job.steps)] = result.tokens
        return Trained(result, self.store)

    def tuned(self, recipe: str | Part, rates: Sequence[float], *, steps: int | None = None) -> float:
        """Which of these multiples of its learning rate gives the recipe the lowest score, on the seed for tuning."""
        score = {
            lr_scale: self.train(recipe, seed=TUNING_SEED, steps=steps, lr_scale=lr_scale).score for lr_scale in rates
        }
        return min(rates, key=lambda lr_scale: score[lr_scale] if math.isfinite(score[lr_scale]) else math.inf)

    def compare(self, x: str | Part, y: str | Part, *, pairs: Any = None, **options: Any) -> Any:
        """`deltax.compare` of two recipes: a Comparison, with .better, .no_worse and .equivalent as verdicts."""
        from deltax.lab.compare import compare

        settings = {"store": self.store, "engine": self.engine, "workers": self.workers, "on_event": self.on_event}
        return compare(x, y, pairs=pairs, **{**settings, **options})

    def ratio(self, fast: Callable[[], Any], slow: Callable[[], Any], *, repeats: int = 9) -> Ratio:
        """Seconds of `slow` over seconds of `fast`, called in turn; the median of `repeats` with its 95 % interval."""
        seconds: dict[Any, list[float]] = {fast: [], slow: []}
        if fast is slow:
            raise UserError("a ratio takes two different functions to time")
        for call in (fast, slow):
            call()
        for turn in range(repeats):
            for call in (fast, slow) if turn % 2 else (slow, fast):
                started = time.perf_counter()
                call()
                seconds[call].append(time.perf_counter() - started)
        found = speed_ratio(seconds[slow], seconds[fast])
        return Ratio(found.interval.low, found.interval.high, found.interval.level, found.value)

    def peak_memory(self, call: Callable[..., Any], *args: Any, warm: Sequence[Any]) -> int:
        """Bytes that call(*args) adds to the peak memory of a fresh process: see `deltax.lab.memory.peak_memory`."""
        from deltax.lab.memory import peak_memory

        return peak_memory(call, *args, warm=warm)

    def at_least(self, values: Sequence[float], threshold: float, unit: str = "", **shown: Any) -> Verdict:
        """Whether the mean of `values`, one a seed, is at least `threshold`, by its t interval.

        Supported when the interval lies above the threshold, opposite when it lies below 0 too, not seen when it lies
        between, else inconclusive. A value that is not finite, of a diverged run, leaves the sign test of the values
        against the threshold, and Fisher's exact test of how often either side diverged.

        shown: `numbers` and `figures`, as for `verdict`
        """
        return self._against(values, threshold, unit, 1, shown)

    def at_most(self, values: Sequence[float], threshold: float, unit: str = "", **shown: Any) -> Verdict:
        """The mirror image of `at_least`."""
        return self._against(values, threshold, unit, -1, shown)

    def verdict(
        self,
        outcome: Outcome,
        *,
        estimate: float | None = None,
        interval: tuple[float, float] | Interval | None = None,
        unit: str = "",
        could_have_seen: float | None = None,
        numbers: dict[str, Any] | None = None,
        figures: dict[str, str] | None = None,
    ) -> Verdict:
        """A verdict at the scale of what this lab has trained. figures: captions with SVG, see `figure`."""
        ends = (interval.low, interval.high) if isinstance(interval, Interval) else interval
        return Verdict(outcome, self._scale(), estimate, ends, unit, could_have_seen, numbers or {}, figures or {})

    def scale(self, recipe: str | Part, steps: int) -> str:
        """What a verdict is about: "0.37M parameters, 0.8M tokens, ..." and the name of the data."""
        from deltax.lab.measure import scale

        return scale(self.recipe(recipe), steps)

    def figure(self, figure: Any) -> str:
        """A matplotlib figure as SVG, the same each time."""
        import matplotlib

        with matplotlib.rc_context(DRAWING), io.StringIO() as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return file.getvalue()

    def _against(self, values: Sequence[float], threshold: float, unit: str, sign: int, shown: dict) -> Verdict:
        array = sign * np.asarray(list(values), float)
        if len(array) < 2:
            raise UserError(f"an interval needs at least 2 seeds, not {len(array)}: use lab.seeds(3)")
        least = sign * threshold
        numbers = {"values": [float(v) for v in sign * array], "threshold": threshold, **shown.get("numbers", {})}
        shown = {**shown, "numbers": numbers, "unit": unit}
        if not np.isfinite(array).all():
            d = paired(array - least, better=Better.HIGHER)
            found = verdict(d, 0.0).outcome
            supported = found is Judged.BETTER or (d.p < 0.05 and np.median(array) > least)
            outcome = "opposite at this scale" if found is Judged.WORSE else "inconclusive"
            return self.verdict("supported at this scale" if supported else outcome, **shown)
        found = paired(array)
        low, high = found.interval.low, found.interval.high
        outcome = _outcome(low, high, least)
        ends = sorted((sign * low, sign * high))
        seen = threshold + math.copysign(detectable(found.sd, found.n), threshold or sign)
        return self.verdict(outcome, estimate=sign * found.mean, interval=tuple(ends), could_have_seen=seen, **shown)

    def _scale(self) -> str:
        if not self._scales:
            return "no training"
        return max(self._scales, key=lambda text: self._scales[text])

    def _keep_start(self, weights: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        for name in sorted(weights):
            tensor = weights[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        name = digest.hexdigest()[:16]
        path = self.store.start_of(name)
        if not path.exists():
            checkpoint.save(path, weights, {})
        return name


def _outcome(low: float, high: float, threshold: float) -> Outcome:
    if low > threshold:
        return "supported at this scale"
    if high < min(0, threshold):
        return "opposite at this scale"
    return "not seen at this scale" if high < threshold else "inconclusive"
