"""Query, key and value by one product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from deltax.kernels.twins import twin
from deltax.papers.language.attention.softmax_attention import Projections
from deltax.parts.attention.scratch import is_plain_training
from deltax.shapes import Keys, Memory, Queries, Stream, Values


@twin("papers.softmax_attention:Projections", why="one product for query, key and value")
class FusedQKV(Projections):
    """`Projections`, with the same parameters, that multiply one x by all three matrices at once where they can.

    They can where the three are plain linear maps of the same x: a part that wraps or replaces one, a hook on one and
    a memory apart from x all go the way of `Projections`.
    """

    def split(
        self, x: Stream, memory: Memory | None = None, values: Memory | None = None
    ) -> tuple[Queries, Keys, Values]:
        maps = (self.query, self.key, self.value)
        apart = any(other is not None and other is not x for other in (memory, values))
        if apart or not all(map(is_linear, maps)) or len({m.bias is None for m in maps}) > 1:
            return super().split(x, memory, values)
        weight = torch.cat([m.weight for m in maps])
        bias = None if maps[0].bias is None else torch.cat([m.bias for m in maps])
        product = _OneProduct.apply if is_plain_training(x, weight) else _one_product
        return product(x, weight, bias, [len(m.weight) for m in maps], self.heads)


def _one_product(x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int], heads: int) -> tuple[Tensor, ...]:
    """Stream (B, T, D) to tensors (B, T, H, K) of the widths H K given."""
    return tuple(y.unflatten(-1, (heads, -1)) for y in linear(x, weight, bias).split(widths, -1))


class _OneProduct(torch.autograd.Function):
    """`_one_product`, whose gradients come back by one product as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int], heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return _one_product(x, weight, bias, widths, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_y = _joined([g.flatten(-2) for g in given]).view(-1, len(weight))
        return (
            (d_y @ weight).view_as(x) if wanted[0] else None,
            d_y.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            d_y.sum(0) if wanted[2] else None,
            None,
            None,
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors (B, T, D) one beside the other, without a copy where they lie so in memory already."""
    first, at = parts[0], parts[0].storage_offset()
    shape = (*first.shape[:-1], sum(p.shape[-1] for p in parts))
    whole, memory = (shape[1] * shape[2], shape[2], 1), first.untyped_storage().data_ptr()
    for part in parts:
        if part.stride() != whole or part.storage_offset() != at or part.untyped_storage().data_ptr() != memory:
            return torch.cat(parts, -1)
        at += part.shape[-1]
    return first.as_strided(shape, whole)


def is_linear(map: nn.Module) -> bool:
    """Whether the map is a plain product that nothing listens to, so another product may do its work."""
    return type(map).forward is nn.Linear.forward and not (map._forward_hooks or map._forward_pre_hooks)
