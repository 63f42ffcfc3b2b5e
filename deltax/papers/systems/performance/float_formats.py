"""Mixed Precision Training. Micikevicius, Narang, Alben, Diamos, Elsen, Garcia, Ginsburg, Houston, Kuchaiev,
Venkatesh, Wu, 2017. arXiv:1710.03740

AdamW, but products are in 16 bits, master weights in 32, and a scaled loss keeps gradients in range.

Exponent bits give range, mantissa bits precision. fp16 lacks range: small gradients become zero unless the loss is
multiplied by a scale, which the update divides out. bf16 has fp32's range (arXiv:1905.12322) and lacks precision: an
update below 1/256 of its weight is rounded away, so updates are summed in a 32-bit copy, or rounded stochastically.
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
    """Bits of exponent and of mantissa, as in IEEE 754, beside one sign bit."""

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


@dataclass
class LossScale:
    """Dynamic loss scale: doubled after `interval` good steps, halved after an overflow."""

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
    """One mixed-precision step: rounded weights, scaled and rounded gradients, an update of the masters (Figure 1).

    loss(*weights) -> a number; `optimizer` steps `masters`, float32 or wider. Returns False where a gradient overflowed
    and the step was skipped. Raises UserError for an unknown format.
    """
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")
    scale, kind = scale or LossScale(1.0), FORMATS[form]
    # Figure 1: round weights, back-propagate S * loss, round gradients, update masters by g / S
    low = [nearest(m.detach(), kind).to(m.dtype).requires_grad_() for m in masters]
    found = [nearest(g, kind) for g in torch.autograd.grad(loss(*low) * scale.scale, low)]
    fine = all(bool(g.isfinite().all()) for g in found)
    if fine:
        for master, gradient in zip(masters, found, strict=True):
            master.grad = (gradient / scale.scale).to(master.dtype)
        optimizer.step()
    scale.update(not fine)  # an overflow skips the step and halves S
    return fine


def nearest(x: Tensor, form: Format) -> Tensor:
    """x (any shape) rounded to the nearest number of the format, ties to even; overflow to infinity. -> float64."""
    step = spacing(x, form)
    return _in_range(torch.round(x.double() / step) * step, x, form)


def stochastic(x: Tensor, form: Format) -> Tensor:
    """x rounded to one of its two neighbours, so that the expectation is x. -> float64."""
    step = spacing(x, form)
    return _in_range(torch.floor(x.double() / step + torch.rand_like(x, dtype=torch.float64)) * step, x, form)


def spacing(x: Tensor, form: Format) -> Tensor:
    """The distance between neighbouring numbers of the format at x, in float64; constant for subnormals."""
    _, exponent = torch.frexp(x.double())
    # 2^(e - mantissa); below the smallest normal number the step is that of subnormals
    lowest = (exponent - 1).clamp(min=1 - form.bias) - form.mantissa
    return ((lowest.long().clamp(max=1023) + 1023) << 52).view(torch.float64)  # a power of two, exactly


def _in_range(rounded: Tensor, x: Tensor, form: Format) -> Tensor:
    # overflow to infinity; infinities and NaN pass through
    rounded = torch.where(rounded.abs() > form.largest, torch.copysign(torch.full_like(rounded, torch.inf), x), rounded)
    return torch.where(x.isfinite(), rounded, x.double())


def bits(x: Tensor, form: Format) -> Tensor:
    """The stored bits (sign, exponent, mantissa) of the nearest number. -> int64."""
    value = nearest(x, form)
    steps = (value.abs() / spacing(value, form)).nan_to_num(0, 0, 0).long()  # the mantissa, with its leading one
    _, exponent = torch.frexp(value)
    field = (exponent.long() - 1 + form.bias).clamp(min=1).masked_fill(value == 0, 1)
    code = ((field - 1) << form.mantissa) + steps  # a leading one adds one to the field; a subnormal has none
    infinity = (2**form.exponent - 1) << form.mantissa
    code = torch.where(value.isinf(), infinity, code)
    code = torch.where(value.isnan(), infinity + 2 ** (form.mantissa - 1), code)
    return code + (torch.signbit(value).long() << (form.exponent + form.mantissa))
