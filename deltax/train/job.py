"""One training run, named by its content."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from deltax.address import JOB_FIELDS
from deltax.errors import UserError
from deltax.kernels.twins import twins_of
from deltax.parts.training.run import Loop, Run
from deltax.recipe import Part, from_json, to_json
from deltax.train import code


@dataclass(frozen=True)
class Job:
    """What to train, on which seed, for how many optimizer steps, at which multiple of the recipe's learning rate.

    `start` is the digest of the weights it goes on from; a fresh model without.
    """

    recipe: Part
    seed: int = 0
    steps: int = 400
    lr_scale: float = 1.0
    precision: str = "float32"
    start: str | None = None

    @property
    def id(self) -> str:
        """Equal for runs that must come out the same: recipe, data, seed, budget, precision and code are all in it."""
        content = {**self.to_json(), "data": fingerprint(self.recipe), "code": code_version(self.recipe)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": to_json(self.recipe),
            "seed": self.seed,
            "steps": self.steps,
            "lr_scale": self.lr_scale,
            "precision": self.precision,
            **({"start": self.start} if self.start else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Job":
        """The job back from `to_json`. Raises UserError for what no job holds: files and stores are not trusted."""
        if isinstance(data, dict):
            data = {JOB_FIELDS.get(k, k): v for k, v in data.items()}
        if not isinstance(data, dict) or "recipe" not in data or data.keys() - _FIELDS.keys():
            raise UserError(f"a stored job is an object with {', '.join(_FIELDS)}, not {str(data)[:60]!r}")
        job = cls(**{**data, "recipe": from_json(data["recipe"])})
        for name, (kind, fits) in _FIELDS.items():
            if not fits(getattr(job, name)):
                raise UserError(f"{name} of a stored job is {kind}, not {getattr(job, name)!r}")
        return job

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "recipe": ("a run", lambda value: isinstance(value, Part) and value.target is Run),
    "seed": ("a whole number", _is(int)),
    "steps": ("a whole number", _is(int)),
    "lr_scale": ("a number", _is(int, float)),
    "precision": ("a floating dtype of torch", lambda value: value in ("float64", "float32", "bfloat16", "float16")),
    "start": ("the digest of weights", lambda value: value is None or bool(re.fullmatch("[0-9a-f]+", str(value)))),
}


def task_of(recipe: Part) -> Any:
    """The recipe's task. One recipe, one object: reading a corpus twice is slow."""
    return _task(recipe["task"])


def fingerprint(recipe: Part) -> str:
    """Changes when the recipe's data does."""
    return task_of(recipe).fingerprint


def loop_of(recipe: Part) -> Loop:
    return recipe["loop"]()


@cache
def _task(task: Part) -> Any:
    return task()


@cache
def code_version(recipe: Part) -> str:
    """A hash of every definition that the recipe's parts and the training loop reach, and of nothing else."""
    makers = {recipe.target, *(v.target for _, v in recipe.walk() if isinstance(v, Part))}
    named = [code.Name(m.__module__, m.__qualname__.partition(".")[0]) for m in makers]
    twins = [code.Name(twin.module, twin.name) for m in makers for twin in twins_of(m)]
    return code.version([code.Name("deltax.train.loop", "train"), *named, *twins])
