"""Many workers' weights under one optimizer, so that a run of many machines is an ordinary run on one."""

import abc
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltax.errors import UserError
from deltax.parts.optimizers import Wrapper
from deltax.recipe import Part


class Replicas(Wrapper, abc.ABC):
    """Copies of a model's weights, one a worker, of which the model holds one at a time.

    A step of the loop is a step of one worker: on its own batch, with its own weights and its own state of the inner
    optimizer. Concrete kinds say whose step is next and what follows a step. `shared` is what the workers agree on;
    `eval` leaves it in the model. Buffers of the model are not copied.

    inner    optimizer of each worker, made once: its groups are the workers', its state is kept for each
    workers  how many there are; raises UserError below 1
    """

    def __init__(self, model: nn.Module, *, inner: Part, workers: int):
        if workers < 1:
            raise UserError(f"training needs at least 1 worker, not {workers}")
        super().__init__(inner(model))
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.shared = [p.detach().clone().requires_grad_() for p in self.weights]
        self.local = [[p.detach().clone() for p in self.weights] for _ in range(workers)]
        self.states: list[dict[Tensor, dict[str, Any]]] = [defaultdict(dict) for _ in range(workers)]
        self.taken = [0] * workers
        self._seated = 0

    @abc.abstractmethod
    def next_worker(self) -> int:
        """Whose step is next, a function of `taken`, the steps that each worker has taken."""

    @abc.abstractmethod
    def stepped(self, worker: int) -> None:
        """Called after each step of a worker, with what it came to in `local`."""

    @abc.abstractmethod
    def agree(self) -> None:
        """Called at the end of a run: bring `shared` up to date."""

    @abc.abstractmethod
    def memory(self) -> tuple[dict[str, Tensor], list[tuple[str, torch.optim.Optimizer]]]:
        """What else a checkpoint must hold: tensors to be restored in place, and optimizers of `shared` by name."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        worker = self._seated
        self.inner.state = self.states[worker]
        self.inner.step()
        assign(self.local[worker], self.weights)
        self.taken[worker] += 1
        self.stepped(worker)
        self._seated = self.next_worker()
        assign(self.weights, self.local[self._seated])

    @torch.no_grad()
    def eval(self) -> None:
        """Leave in the model what the workers agree on. The run ends here."""
        self.agree()
        assign(self.weights, self.shared)

    @torch.no_grad()
    def descend(self, outer: torch.optim.Optimizer, pseudo_gradient: Tensor) -> None:
        """Move `shared` by one step of `outer` along a pseudo-gradient (N,), the weights before less those after."""
        pieces = pseudo_gradient.split([p.numel() for p in self.shared])
        for p, piece in zip(self.shared, pieces, strict=True):
            p.grad = _spread_as(p, piece.view(p.shape))
        outer.step()
        outer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        tensors, optimizers = self.memory()
        state: dict[int, dict[str, Any]] = {i: {} for i in range(len(self.weights))}
        for i, weight in enumerate(self.weights):
            state[i]["shared"] = self.shared[i].detach()
            for worker, local in enumerate(self.local):
                state[i][f"local.{worker}"] = local[i]
                for word, value in self.states[worker][weight].items():
                    state[i][f"inner.{worker}.{word}"] = value
            for name, optimizer in optimizers:
                for word, value in optimizer.state[self.shared[i]].items():
                    state[i][f"{name}.{word}"] = value
        state[0] |= {"taken": torch.tensor(self.taken), **{f"memory.{k}": v for k, v in tensors.items()}}
        return {"state": state, "param_groups": self.inner.state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        tensors, optimizers = self.memory()
        named = dict(optimizers)
        for i, words in state_dict["state"].items():
            for word, value in words.items():
                kind, _, rest = word.partition(".")
                if kind == "shared":
                    self.shared[i].copy_(value)
                elif kind == "local":
                    self.local[int(rest)][i].copy_(value)
                elif kind == "inner":
                    worker, _, rest = rest.partition(".")
                    self.states[int(worker)][self.weights[i]][rest] = _copied(value)
                elif kind == "taken":
                    self.taken = value.tolist()
                elif kind == "memory":
                    tensors[rest].copy_(value)
                else:
                    named[kind].state[self.shared[i]][rest] = _copied(value)
        self._seated = self.next_worker()
        assign(self.weights, self.local[self._seated])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one vector (N,); those that are sharded over processes are gathered, and each process must ask."""
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).reshape(-1) for t in tensors])


def _spread_as(model: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every process has, sharded as `model` is."""
    if not hasattr(model, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # half as long to load as torch

    return distribute_tensor(whole, model.device_mesh, model.placements)


def assign(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each tensor into its counterpart."""
    for a, b in zip(to, source, strict=True):
        a.data.copy_(b.data)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
