"""What is computed in float32 at least, in whatever precision autocast multiplies: distances, cosines, places, counts.

bfloat16 keeps 8 bits: of two codes at nearly one distance it picks either, and it counts no further than 256.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_F = TypeVar("_F", bound=Callable[..., Any])


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def in_full(x: Tensor) -> torch.autocast:
    """A context in which autocast, where it is on, leaves products on x's device in the precision of their factors."""
    return torch.autocast(x.device.type, enabled=False)


def in_float32(function: _F) -> _F:
    """The function, with autocast off and its floats in float32 at least. They may be in tuples."""
    widened = lambda x: at_least_float32(x) if x.is_floating_point() else x

    @functools.wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, widened, (args, kwargs))
        kind = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return exact  # type: ignore[return-value]


@in_float32
def similarity(a: Float[Tensor, "*A N K"], b: Float[Tensor, "*A M K"]) -> Float[Tensor, "*A N M"]:
    """a b', the dot product of every two vectors: the cosine, where they have length one."""
    return a @ b.mT


@in_float32
def of_length_one(x: Float[Tensor, "*A K"]) -> Float[Tensor, "*A K"]:
    """x / |x|."""
    return torch.nn.functional.normalize(x, dim=-1)
