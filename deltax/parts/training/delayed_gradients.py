"""A pipeline that never waits, in one process: each stage's gradients are taken at weights some updates old."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltax.errors import UserError
from deltax.parts.training.optimizers import Wrapper
from deltax.recipe import Part


class DelayedGradients(Wrapper):
    """An optimizer whose model holds, for stage s of P, the weights of P - 1 - s updates ago; `eval` leaves the newest.

    This is what an asynchronous pipeline with stashed weights (PipeDream) computes: forward and backward of a batch see
    one version of a stage's weights, and the update goes to the newest. Parameters are cut into stages in their order,
    as evenly as their sizes allow. A tied weight belongs to the stage where it comes first.

    Raises UserError for less than one stage, or more than there are parameters.
    """

    def __init__(self, model: nn.Module, *, inner: Part, stages: int = 4):
        super().__init__(inner(model))
        self.weights = [p for p in model.parameters() if p.requires_grad]
        if not 1 <= stages <= len(self.weights):
            raise UserError(f"{len(self.weights)} parameters cannot be cut into {stages} stages")
        self.delays = [stages - 1 - stage for stage in _stages(self.weights, stages)]
        # Oldest first: what the model holds, ..., the newest.
        self.versions = [
            [p.detach().clone() for _ in range(d + 1)] for p, d in zip(self.weights, self.delays, strict=True)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for p, versions in zip(self.weights, self.versions, strict=True):
            p.copy_(versions[-1])
        self.inner.step()
        for p, versions in zip(self.weights, self.versions, strict=True):
            versions.append(p.detach().clone())
            versions.pop(0)
            p.copy_(versions[0])

    @torch.no_grad()
    def eval(self) -> None:
        for p, versions in zip(self.weights, self.versions, strict=True):
            p.copy_(versions[-1])

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        for i, (p, versions) in enumerate(zip(self.weights, self.versions, strict=True)):
            state[i] = {f"inner.{word}": value for word, value in self.inner.state[p].items()}
            state[i] |= {f"version.{age}": version for age, version in enumerate(versions)}
        return {"state": state, "param_groups": self.inner.state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, words in state_dict["state"].items():
            for word, value in words.items():
                kind, _, rest = word.partition(".")
                if kind == "version":
                    self.versions[i][int(rest)].copy_(value)
                else:
                    self.inner.state[self.weights[i]][rest] = value.clone() if isinstance(value, Tensor) else value
            self.weights[i].copy_(self.versions[i][0])


def _stages(weights: list[nn.Parameter], stages: int) -> list[int]:
    """The stage of each parameter: in order, each stage at least one, near equal in size."""
    total, seen, found = sum(p.numel() for p in weights), 0, []
    for i, p in enumerate(weights):
        by_size = min(stages - 1, int((seen + p.numel() / 2) * stages / total))
        least = stages - (len(weights) - i)  # enough are left for the stages that follow
        last = found[-1] if found else -1
        found.append(min(max(by_size, least, 0), last + 1))
        seen += p.numel()
    return found
