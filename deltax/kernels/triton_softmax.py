"""Softmax over the last axis as Triton kernels: two reads of a row and one write, whatever its length.

Each lane keeps the pair (maximum, sum) of the columns that it has seen, as in online softmax, and the lanes' pairs are
merged once, at the end of the first read.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltax.papers.systems.attention_kernels import online_softmax


def softmax(scores: Tensor, *, block: int = 1024) -> Tensor:
    """The softmax over the last axis, zeros for a row that is -inf throughout. Any shape; gradients reach the scores.

    `block` is how many scores are read together, rounded up to a power of two. Sums are in float32 at least. Raises
    UserError for a block below 1.
    """
    online_softmax.softmax(scores.new_empty(0, 1), block=block)  # refuses a block below 1
    if not scores.numel():
        return scores.clone()
    return _Softmax.apply(scores, triton.next_power_of_2(block))


softmax.reference = online_softmax.softmax.function


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, block: int) -> Tensor:
        rows = scores.contiguous()
        out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        columns = scores.shape[-1]
        _softmax[(scores.numel() // columns,)](rows, out, columns, BLOCK=_block(columns, block), WIDE=_wide(scores))
        ctx.save_for_backward(out)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        d_scores = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        columns = out.shape[-1]
        _softmax_backward[(out.numel() // columns,)](
            out, d_out.contiguous(), d_scores, columns, BLOCK=_block(columns, ctx.block), WIDE=_wide(out)
        )
        return d_scores, None


def _block(columns: int, block: int) -> int:
    return min(block, triton.next_power_of_2(columns))


def _wide(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
@no_type_check
def _softmax(scores, out, COLUMNS, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    lane = tl.arange(0, BLOCK)
    largest, weight = tl.full([BLOCK], float("-inf"), WIDE), tl.zeros([BLOCK], WIDE)
    for start in range(0, COLUMNS, BLOCK):
        x = tl.load(scores + row + start + lane, mask=start + lane < COLUMNS, other=float("-inf")).to(WIDE)
        new = tl.maximum(largest, x)
        point = tl.where(new == float("-inf"), 0.0, new)
        weight = weight * tl.exp(largest - point) + tl.exp(x - point)
        largest = new
    highest = tl.max(largest, 0)
    point = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(weight * tl.exp(largest - point), 0)
    total = tl.where(total == 0.0, 1.0, total)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + lane < COLUMNS
        x = tl.load(scores + row + start + lane, mask=inside, other=float("-inf")).to(WIDE)
        tl.store(out + row + start + lane, (tl.exp(x - point) / total).to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _softmax_backward(out, d_out, d_scores, COLUMNS, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """dx = p (dp - sum of p dp)."""
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    lane = tl.arange(0, BLOCK)
    reached = tl.zeros([BLOCK], WIDE)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + lane < COLUMNS
        p = tl.load(out + row + start + lane, mask=inside, other=0.0).to(WIDE)
        reached += p * tl.load(d_out + row + start + lane, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(reached, 0)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + lane < COLUMNS
        p = tl.load(out + row + start + lane, mask=inside, other=0.0).to(WIDE)
        d_p = tl.load(d_out + row + start + lane, mask=inside, other=0.0).to(WIDE)
        tl.store(d_scores + row + start + lane, (p * (d_p - mean)).to(d_scores.dtype.element_ty), mask=inside)
