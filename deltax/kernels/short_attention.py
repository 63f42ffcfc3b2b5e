"""Causal attention of few positions, for training on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.parts.scores import Rules
from deltax.parts.scratch import is_plain_training, scratch
from deltax.parts.tiles import tiles
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
        packed, out = q.new_empty(3, b * h, t, width), q.new_empty(q.shape)
        for into, given in zip(packed, (q, k, v), strict=True):
            _by_head(into, h).copy_(given)
        q, k, v = packed
        later = q.new_full((t, t), -torch.inf).triu_(1)
        kept = []
        for rows in _halves(t):
            seen = slice(rows.stop)
            scores = q.new_empty(b * h, rows.stop - rows.start, rows.stop)
            scores.baddbmm_(q[:, rows], k[:, seen].mT, beta=0, alpha=width**-0.5)
            scores[..., rows].add_(later[rows, rows])
            kept.append(torch.softmax(scores, -1, out=scores))
            mean = scratch("mean", (*scores.shape[:2], width), q)
            out[:, rows].copy_(_by_head(torch.bmm(scores, v[:, seen], out=mean), h))
        ctx.save_for_backward(packed, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        packed, *kept = ctx.saved_tensors
        (q, k, v), (b, t, h, width) = packed, d_out.shape
        given = scratch("mean", q.shape, q)
        _by_head(given, h).copy_(d_out)
        d_heads = q.new_empty(b, t, 3, h, width)
        d_k, d_v = scratch("d_keys", (2, *q.shape), q)
        for rows, weights in reversed(list(zip(_halves(t), kept, strict=True))):
            seen = slice(rows.stop)
            d_scores = scratch("scores", weights.shape, q)
            d_scores.baddbmm_(given[:, rows], v[:, seen].mT, beta=0, alpha=width**-0.5)  # so d_q and d_k are scaled
            torch.ops.aten._softmax_backward_data.out(d_scores, weights, -1, q.dtype, grad_input=d_scores)
            d_q = torch.bmm(d_scores, k[:, seen], out=scratch("d_q", (*weights.shape[:2], width), q))
            d_heads[:, rows, 0].copy_(_by_head(d_q, h))
            for total, by, of in ((d_k, d_scores, q), (d_v, weights, given)):
                if rows.stop == t:
                    torch.bmm(by.mT, of[:, rows], out=total)
                else:
                    total[:, seen].add_(torch.bmm(by.mT, of[:, rows]))
        d_heads[:, :, 1].copy_(_by_head(d_k, h))
        d_heads[:, :, 2].copy_(_by_head(d_v, h))
        return d_heads.unbind(2)


def _halves(time: int) -> list[slice]:
    return list(tiles(time, -(-time // 2)))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B H, T, K), seen as (B, T, H, K)."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)
