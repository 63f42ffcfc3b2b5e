"""Modules that training moves beside the gradient, once an optimizer step: key encoders, queues, running codebooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Gather = Callable[[list[Tensor]], list[Tensor]]


class Moving(nn.Module):
    """A module that training moves beside the gradient.

    In training, `ahead()` comes before each forward and `note(...)` after it, with tensors whose first axis is joined
    over calls. Outside of `one_step` each pair is a step of its own. Inside, a batch may pass in pieces and on several
    processes: `before` is called once, at the start, and `move` once, at the end, with the notes of all of them.
    """

    _notes: list[tuple[Tensor, ...]] | None = None

    def before(self) -> None:
        """What is moved before the first forward of a step."""

    def move(self, *notes: Any) -> None:
        """What is moved after the last forward of a step."""

    def ahead(self) -> None:
        if self._notes is None:
            self.before()

    def note(self, *tensors: Tensor) -> None:
        if self._notes is None:
            self.move(*tensors)
        else:
            self._notes.append(tuple(tensor.detach() for tensor in tensors))


@contextmanager
def one_step(modules: Sequence[Moving], gather: Gather = list) -> Iterator[None]:
    """One optimizer step of these modules. `gather` gives, of this process's pieces, those of all, in their order."""
    for module in modules:
        module.before()
        module._notes = []
    try:
        yield
        for module in modules:
            columns = zip(*(module._notes or ()), strict=True)
            joined = [torch.cat(gather(list(column))) for column in columns]
            if joined:
                module.move(*joined)
    finally:
        for module in modules:
            module._notes = None


def moving(model: nn.Module) -> list[Moving]:
    """Those of a model, the model itself included."""
    return [module for module in model.modules() if isinstance(module, Moving)]
