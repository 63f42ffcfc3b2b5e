"""The root of every recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltax.contract import check
from deltax.errors import UserError
from deltax.recipe import Part, takes


@dataclass(frozen=True)
class Loop:
    """How much a run reads and how it steps.

    batch       examples a step
    steps       optimizer steps of a run, unless a budget says otherwise
    max_grad_norm largest norm of the gradient
    accumulate  pieces that a batch is cut into; the gradient is that of the whole

    Raises UserError for a batch, steps or pieces below one.
    """

    batch: int = 16
    steps: int = 400
    max_grad_norm: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        for count in ("batch", "steps", "accumulate"):
            if (value := getattr(self, count)) < 1:
                raise UserError(f"loop.{count} is at least 1, not {value}")


@dataclass(frozen=True)
class Run:
    """All that one training run needs, and nothing that is particular to one machine. Slots are in `deltax.slots`.

    Raises UserError for parts that do not fit together, as their contracts tell (`deltax.contract`).
    """

    model: Part
    task: Part
    objective: Part
    batches: Part
    optimizer: Part
    schedule: Part
    loop: Part

    def __post_init__(self) -> None:
        check(Part(Run, tuple(vars(self).items())), "these parts do not fit together")

    def build(self, task_spec: Mapping[str, Any]) -> nn.Module:
        """A new model, built from the entries of the task spec that its constructor names."""
        return build_model(self.model, task_spec)


def build_model(model: Part, task_spec: Mapping[str, Any]) -> nn.Module:
    """A new model, built from the entries that its constructor names, or all where it takes any (`**task_spec`)."""
    named = takes(model.target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in named.values())
    return model(**{k: v for k, v in task_spec.items() if takes_any or k in named})


def from_task(model: nn.Module, task: Any, step: int, *, size: int, seed: int) -> Any:
    """The task's own batch for this step: supervised learning."""
    return task.batch(step, size=size, seed=seed)
