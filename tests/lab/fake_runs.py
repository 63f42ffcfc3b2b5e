"""An executor whose losses are a known function of budget, rate and seed: a comparison's arithmetic in milliseconds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deltax.lab.store import Result
from deltax.train.initialise import stream

SLOPE, SD, CORRELATION = -0.23, 0.0136, 0.47
SEQUENCES, DOCUMENTS = 40, 10
STEPS = 40  # of X at the budget 'quick'


@dataclass(frozen=True)
class Truth:
    """What a recipe really is: its gain over the same budget of X, its best factor, and where it diverges."""

    gain: float = 1.0
    best: float = 1.0
    diverges: Callable = lambda job: False


@dataclass
class World:
    """`execute` for recipes by title. A pair's runs share a part of their noise; `sd` is that of their difference."""

    truths: dict[str, Truth]
    steps: int = STEPS
    sd: float = SD
    salt: int = 0
    bowl: float = 0.05
    trained: list = field(default_factory=list)

    def execute(self, jobs, *, store=None, engine="local", workers=1, on_event=lambda event: None):
        results = {}
        for job in jobs:
            self.trained.append(job)
            results[job.id] = self.result(job)
        return results

    def loss(self, job) -> float:
        truth = self.truths[job.recipe.title]
        run = self.sd / math.sqrt(2 * (1 - CORRELATION))
        # A ladder's runs at one seed share the pair's noise too, as they share its data.
        common = self._normal("pair", job.seed) * run * math.sqrt(CORRELATION)
        own = self._normal(*_named(job))
        bowl = self.bowl * math.log(job.lr_scale / truth.best) ** 2
        return (
            3
            + SLOPE * math.log(job.steps * truth.gain / self.steps)
            + bowl
            + common
            + own * run * math.sqrt(1 - CORRELATION)
        )

    def result(self, job) -> Result:
        curve = [(step, 5 - step / job.steps) for step in range(job.steps)]
        if self.truths[job.recipe.title].diverges(job):
            empty = np.empty(0)
            return Result(job, None, empty, empty, empty, {}, curve[:2], 0, 0.1, True, {})
        loss = self.loss(job)
        wiggle = np.random.default_rng(stream(self.salt, *_named(job))).normal(size=SEQUENCES) * 1e-4
        values = loss + np.sin(np.arange(SEQUENCES)) + wiggle
        values += loss - values.mean()
        clusters = np.arange(SEQUENCES) // (SEQUENCES // DOCUMENTS)
        return Result(job, loss, values, np.full(SEQUENCES, 16.0), clusters, {}, curve, job.steps * 64, 0.1, False, {})

    def _normal(self, *words) -> float:
        return np.random.default_rng(stream(self.salt, *words)).normal()


def _named(job) -> tuple:
    """A run's name without the folder its text lies in, which is another in every test run."""
    return job.recipe.put("task.source", "text").id, job.recipe.title, job.seed, job.steps, job.lr_scale
