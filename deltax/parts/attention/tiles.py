"""What kernels that go over attention tile by tile share: how to cut, and how one tile is scored."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from deltax.errors import UserError
from deltax.parts.attention.scores import Rules
from deltax.shapes import Keys, Queries, Scores


def tiles(length: int, size: int) -> Iterator[slice]:
    """Slices that cut `length` positions into tiles of `size`, the last one shorter.

    Raises UserError for a size below 1.
    """
    if size < 1:
        raise UserError(f"tile is how many queries or keys are taken together: give at least 1, not {size}")
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def tile_scores(q: Queries, k: Keys, rules: Rules, rows: slice = slice(None), columns: slice = slice(None)) -> Scores:
    """rules(q k' / sqrt(K)) of one tile, in float32 at least. -> (B, H, T, S)."""
    scores = torch.einsum("bthk,bshk->bhts", q, repeat_kv(k, q.shape[2])) / math.sqrt(q.shape[-1])
    return rules(scores.to(accumulation_dtype(scores)), rows, columns)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, S, G, K), each for H / G heads that share it. -> (B, S, H, K)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def expand_over_heads(x: Tensor) -> Tensor:
    """(B, H, T) -> (B, T, H, 1)."""
    return x.transpose(1, 2)[..., None]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The precision that sums over many are kept in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision that autocast has for matrix products, where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
