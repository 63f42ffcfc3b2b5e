"""Causal attention of few positions, for training on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.parts.scratch import scratch
from deltax.parts.tiles import tiles
from deltax.shapes import Heads, Keys, Queries, Values

# Positions up to which the weights, B H T T / 2 numbers more, cost less to keep than to make again.
FEW = 256


def weights_kept(q: Queries, k: Keys, v: Values) -> Heads:
    """Causal `attend` that keeps its weights for the backward pass. Queries, keys and values (B, T, H, K)."""
    return _WeightsKept.apply(q, k, v)


class _WeightsKept(torch.autograd.Function):
    """In two halves, of which the first never looks at the second: a quarter of all scores is not computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, h, width = q.shape
        later = q.new_full((t, t), -torch.inf).triu_(1)
        by_head = q.new_empty(3, b, h, t, width)
        torch.mul(q.transpose(1, 2), width**-0.5, out=by_head[0])
        by_head[1], by_head[2] = k.transpose(1, 2), v.transpose(1, 2)
        q, k, v = by_head.flatten(1, 2)
        mean, kept = scratch("mean", q.shape, q), []
        for rows in _halves(t):
            seen = slice(rows.stop)
            scores = torch.bmm(q[:, rows], k[:, seen].mT)
            scores[..., rows].add_(later[rows, rows])
            kept.append(torch.softmax(scores, -1, out=scores))
            mean[:, rows] = torch.bmm(scores, v[:, seen])
        ctx.save_for_backward(by_head, *kept)
        return mean.view(b, h, t, width).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        by_head, *kept = ctx.saved_tensors
        _, b, h, t, width = by_head.shape
        q, k, v = by_head.flatten(1, 2)
        given = scratch("mean", (b, h, t, width), q).copy_(d_out.transpose(1, 2)).flatten(0, 1)
        d_q, d_k, d_v = d_by_head = scratch("by_head", (3, b * h, t, width), q)
        for half, rows in reversed(list(enumerate(_halves(t)))):
            seen, weights = slice(rows.stop), kept[half]
            d_scores = torch.bmm(given[:, rows], v[:, seen].mT, out=scratch("scores", weights.shape, q))
            torch.ops.aten._softmax_backward_data.out(d_scores, weights, -1, q.dtype, grad_input=d_scores)
            d_q[:, rows] = torch.bmm(d_scores, k[:, seen])
            if rows.stop == t:
                torch.bmm(d_scores.mT, q[:, rows], out=d_k)
                torch.bmm(weights.mT, given[:, rows], out=d_v)
            else:
                d_k[:, seen].add_(torch.bmm(d_scores.mT, q[:, rows]))
                d_v[:, seen].add_(torch.bmm(weights.mT, given[:, rows]))
        d_q.mul_(width**-0.5)
        together = d_out.new_empty(b, t, 3, h, width)
        together.copy_(d_by_head.view(3, b, h, t, width).permute(1, 3, 0, 2, 4))
        return together.unbind(2)


def _halves(time: int) -> list[slice]:
    return list(tiles(time, -(-time // 2)))
