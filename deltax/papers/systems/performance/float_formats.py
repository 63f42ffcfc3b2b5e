"""Mixed Precision Training. Micikevicius, Narang, Alben, Diamos, Elsen, Garcia, Ginsburg, Houston, Kuchaiev,
Venkatesh, Wu, 2017. arXiv:1710.03740

AdamW, or any training, but products are in 16 bits, while weights are kept in 32 and losses scaled so that gradients
stay in range.

A format spends its bits on range (exponent) or on precision (mantissa). fp16 has the precision and lacks the range:
small gradients become zero, unless the loss is multiplied by a scale that the update divides out again. bf16 has the
range of fp32 (A Study of BFLOAT16 for Deep Learning Training, arXiv:1905.12322) and lacks precision: an update below a
256th of its weight is rounded away, so updates are summed in a 32-bit copy, or rounded up or down by chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import paper
from deltax.errors import UserError
from deltax.papers.optimization.optimizers.adamw import adamw


class Format(NamedTuple):
    """A sign, and this many bits of exponent and of mantissa, as in IEEE 754."""

    exponent: int
    mantissa: int

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        return (2 - 2.0**-self.mantissa) * 2.0**self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)


FORMATS = {"fp32": Format(8, 23), "tf32": Format(8, 10), "bf16": Format(8, 7), "fp16": Format(5, 10)}


def nearest(x: Tensor, form: Format) -> Tensor:
    """x (any shape) to the nearest number of the format, ties to even; past the largest, infinity. -> float64."""
    step = spacing(x, form)
    return _in_range(torch.round(x.double() / step) * step, x, form)


def stochastic(x: Tensor, form: Format) -> Tensor:
    """x to one of its two neighbours, to the nearer more often, so that the mean is x. -> float64."""
    step = spacing(x, form)
    return _in_range(torch.floor(x.double() / step + torch.rand_like(x, dtype=torch.float64)) * step, x, form)


def spacing(x: Tensor, form: Format) -> Tensor:
    """The distance between neighbours in the format about x, in float64; constant below the smallest normal number."""
    _, exponent = torch.frexp(x.double())
    lowest = (exponent - 1).clamp(min=1 - form.bias) - form.mantissa
    return ((lowest.long().clamp(max=1023) + 1023) << 52).view(torch.float64)  # a power of two, exactly


def _in_range(rounded: Tensor, x: Tensor, form: Format) -> Tensor:
    rounded = torch.where(rounded.abs() > form.largest, torch.copysign(torch.full_like(rounded, torch.inf), x), rounded)
    return torch.where(x.isfinite(), rounded, x.double())


def bits(x: Tensor, form: Format) -> Tensor:
    """The bits, sign first, then exponent, then mantissa, that the nearest number is stored as. -> int64."""
    value = nearest(x, form)
    steps = (value.abs() / spacing(value, form)).nan_to_num(0, 0, 0).long()  # the mantissa, with its leading one
    _, exponent = torch.frexp(value)
    field = (exponent.long() - 1 + form.bias).clamp(min=1).masked_fill(value == 0, 1)
    code = ((field - 1) << form.mantissa) + steps  # a leading one adds one to the field; a subnormal has none
    infinity = (2**form.exponent - 1) << form.mantissa
    code = torch.where(value.isinf(), infinity, code)
    code = torch.where(value.isnan(), infinity + 2 ** (form.mantissa - 1), code)
    return code + (torch.signbit(value).long() << (form.exponent + form.mantissa))


@dataclass
class LossScale:
    """What the loss is multiplied by: doubled after `interval` good steps, halved after one that overflowed."""

    scale: float = 2.0**16
    interval: int = 2000
    good: int = 0

    def update(self, overflowed: bool) -> None:
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale /= 2
        elif self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0


@paper(on=adamw, arxiv="1710.03740", year=2017)
def mixed_step(
    loss: Callable[..., Tensor],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    form: str = "fp16",
    scale: LossScale | None = None,
) -> bool:
    """One step: weights rounded to the format, scaled gradients rounded to it, an update of the masters (Figure 1).

    loss(*weights) -> a number; `masters` are float32 at least, and what `optimizer` steps along. True if the step was
    taken, False where a gradient overflowed and it was left out. Raises UserError for an unknown format.
    """
    if form not in FORMATS:
        raise UserError(f"a format is one of {', '.join(FORMATS)}, not {form!r}")
    scale, kind = scale or LossScale(1.0), FORMATS[form]
    low = [nearest(m.detach(), kind).to(m.dtype).requires_grad_() for m in masters]
    found = [nearest(g, kind) for g in torch.autograd.grad(loss(*low) * scale.scale, low)]
    fine = all(bool(g.isfinite().all()) for g in found)
    if fine:
        for master, gradient in zip(masters, found, strict=True):
            master.grad = (gradient / scale.scale).to(master.dtype)
        optimizer.step()
    scale.update(not fine)
    return fine
