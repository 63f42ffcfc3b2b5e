"""Memory that is written over at every call: on a CPU a fresh page costs more than what is computed in it."""

import math
import threading

import torch
from torch import Tensor

VIEWS_KEPT = 256  # shapes that are ready when asked for again: to make one is several calls


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of this shape, of the kind of `like`, with anything in it. The same name is the same memory.

        Of the same name and shape it is the same object: write to it, and change nothing else of it.
        """
        view = self.views.get((name, shape, like.dtype, like.device))
        return self._view(name, shape, like.dtype, like.device) if view is None else view

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count, kind = math.prod(shape), (name, dtype, device)
        held = self.held.get(kind)
        with torch.inference_mode(False):  # else none but inference could write to it
            small = held is None or held.numel() < count
            if small or len(self.views) >= VIEWS_KEPT:
                self.views.clear()
            if small:
                held = self.held[kind] = torch.empty(count, dtype=dtype, device=device)
            view = self.views[name, shape, dtype, device] = held[:count].view(shape)
        return view

    def clear(self) -> None:
        """Give all of it back."""
        self.views.clear()
        self.held.clear()


scratch = _Scratch()


def is_plain_training(*tensors: Tensor) -> bool:
    """Whether gradients are wanted of plain tensors on a CPU, in the precision they have: what kernels here are for."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in tensors)
