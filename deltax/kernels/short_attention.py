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
    """Causal `attend` that keeps its weights for the backward pass, where it `suits`."""
    return _WeightsKept.apply(q, k, v)


class _WeightsKept(torch.autograd.Function):
    """In two halves, of which the first never looks at the second: a quarter of all scores is not computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, h, width = q.shape
        later = q.new_full((t, t), -torch.inf).triu_(1)
        q, k, v = (_by_head(x, x.new_empty(b, h, t, width)) for x in (q, k, v))
        q.mul_(width**-0.5)
        mean, kept = scratch("mean", q.shape, q), []
        for rows in _halves(t):
            seen = slice(rows.stop)
            scores = torch.bmm(q[:, rows], k[:, seen].mT)
            scores[..., rows].add_(later[rows, rows])
            kept.append(torch.softmax(scores, -1, out=scores))
            mean[:, rows] = torch.bmm(scores, v[:, seen])
        ctx.save_for_backward(q, k, v, *kept)
        return _own(mean, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        b, t, h, width = d_out.shape
        given = _by_head(d_out, scratch("mean", (b, h, t, width), q))
        d_q, d_k, d_v = (scratch(name, q.shape, q) for name in ("d_q", "d_k", "d_v"))
        for rows, weights in reversed(list(zip(_halves(t), kept, strict=True))):
            seen = slice(rows.stop)
            d_scores = torch.bmm(given[:, rows], v[:, seen].mT, out=scratch("scores", weights.shape, q))
            torch.ops.aten._softmax_backward_data.out(d_scores, weights, -1, q.dtype, grad_input=d_scores)
            d_q[:, rows] = torch.bmm(d_scores, k[:, seen])
            for total, by, of in ((d_k, d_scores, q), (d_v, weights, given)):
                if rows.stop == t:
                    torch.bmm(by.mT, of[:, rows], out=total)
                else:
                    total[:, seen].add_(torch.bmm(by.mT, of[:, rows]))
        d_q.mul_(width**-0.5)
        return tuple(_own(d, h) for d in (d_q, d_k, d_v))


def _halves(time: int) -> list[slice]:
    return list(tiles(time, -(-time // 2)))


def _by_head(x: Tensor, into: Tensor) -> Tensor:
    """(B, T, H, K) copied into (B, H, T, K), and that as (B H, T, K)."""
    return into.copy_(x.transpose(1, 2)).flatten(0, 1)


def _own(x: Tensor, heads: int) -> Tensor:
    """(B H, T, K) as (B, T, H, K), in memory of its own: of one head it would be the scratch that it was made in."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2).clone(memory_format=torch.contiguous_format)
