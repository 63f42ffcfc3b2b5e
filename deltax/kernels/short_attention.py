"""Causal attention of few positions, for training on a CPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.parts.attention.scores import Rules
from deltax.parts.attention.scratch import is_plain_training, scratch
from deltax.parts.attention.tiles import tiles
from deltax.shapes import Heads, Keys, Queries, Values

# Positions up to which the weights, B H T T / 2 numbers more, cost less to keep than to make again.
FEW = 256


def suits(q: Queries, k: Keys, v: Values, rules: Rules) -> bool:
    """Whether `weights_kept` computes these, and in less time than a kernel that keeps no weights."""
    known = rules.is_plain and rules.is_causal and q.shape == k.shape == v.shape
    return known and q.shape[1] <= FEW and is_plain_training(q, k, v)


def weights_kept(q: Queries, k: Keys, v: Values) -> Heads:
    """Causal `attend` that keeps its weights for the backward pass, where it `suits`.

    The gradients of q, k and v lie side by side in memory, as the product that made all three wants them.
    """
    return _WeightsKept.apply(q, k, v)


class _WeightsKept(torch.autograd.Function):
    """In two halves, of which the first never looks at the second: a quarter of all scores is not computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, h, width = q.shape
        packed, out = q.new_empty(3, b, h, t, width), q.new_empty(q.shape)
        for by_head, given in zip(packed.transpose(2, 3).unbind(), (q, k, v), strict=True):
            by_head.copy_(given)
        packed = packed.view(3, b * h, t, width)
        (q, k, v), out_by_head = packed.unbind(), out.transpose(1, 2)
        later, kept = _later(-(-t // 2), q.dtype), []
        for rows in _halves(t):
            seen, count = slice(rows.stop), rows.stop - rows.start
            scores = q.new_empty(b * h, count, rows.stop)
            scores.baddbmm_(q[:, rows], k[:, seen].mT, beta=0, alpha=width**-0.5)
            scores[..., rows].add_(later[:count, :count])
            kept.append(torch.softmax(scores, -1, out=scores))
            mean = torch.bmm(scores, v[:, seen], out=scratch("by_head", (b * h, count, width), q))
            out_by_head[:, :, rows].copy_(mean.view(b, h, count, width))
        ctx.save_for_backward(packed, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        packed, *kept = ctx.saved_tensors
        (q, k, v), (b, t, h, width) = packed.unbind(), d_out.shape
        d_mean = scratch("by_head", q.shape, q)
        d_mean.view(b, h, t, width).transpose(1, 2).copy_(d_out)
        d_heads = q.new_empty(b, t, 3, h, width)
        d_by_head, d_keys = d_heads.permute(2, 0, 3, 1, 4), scratch("d_keys", (2, *q.shape), q)
        d_k, d_v = d_keys.unbind()
        for rows, weights in zip(reversed(_halves(t)), reversed(kept), strict=True):
            seen, count = slice(rows.stop), rows.stop - rows.start
            d_scores = scratch("scores", weights.shape, q)
            d_scores.baddbmm_(d_mean[:, rows], v[:, seen].mT, beta=0, alpha=width**-0.5)  # so d_q and d_k are scaled
            torch._softmax_backward_data(d_scores, weights, -1, q.dtype, grad_input=d_scores)
            d_q = torch.bmm(d_scores, k[:, seen], out=scratch("d_q", (b * h, count, width), q))
            d_by_head[0, :, :, rows].copy_(d_q.view(b, h, count, width))
            for total, by, of in ((d_k, d_scores, q), (d_v, weights, d_mean)):
                if rows.stop == t:
                    torch.bmm(by.mT, of[:, rows], out=total)
                else:
                    total[:, seen].add_(torch.bmm(by.mT, of[:, rows]))
        d_by_head[1:].copy_(d_keys.view(2, b, h, t, width))
        return d_heads.unbind(2)


@cache
def _halves(time: int) -> tuple[slice, ...]:
    return tuple(tiles(time, -(-time // 2)))


@cache
def _later(time: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (T, T) so that no position sees a later one."""
    return torch.full((time, time), -torch.inf, dtype=dtype, device="cpu").triu_(1)
