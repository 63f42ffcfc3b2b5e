"""Memory that is written over at every call: on a CPU a fresh page costs more than what is computed in it."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape, of the kind of `like`, with anything in it. The same name is the same memory."""
        count, kind = math.prod(shape), (name, like.dtype, like.device)
        held = self.held.get(kind)
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # else none but inference could write to it
                held = self.held[kind] = like.new_empty(count)
        return (held if held.numel() == count else held[:count]).view(shape)

    def clear(self) -> None:
        """Give all of it back."""
        self.held.clear()


scratch = _Scratch()


def is_plain_training(*tensors: Tensor) -> bool:
    """Whether gradients are wanted of plain tensors on a CPU, in the precision they have: what kernels here are for."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in tensors)
