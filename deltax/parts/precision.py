"""The precision of what must not be computed in 16 bits: areas, coordinates, sums over many pixels, losses."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def in_full(x: Tensor) -> torch.autocast:
    """A context in which autocast, where it is on, leaves products on x's device in the precision of their factors."""
    return torch.autocast(x.device.type, enabled=False)
