"""Muon: An optimizer for hidden layers in neural networks. Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, 2024.

Momentum descent, but each matrix moves by the nearest matrix whose singular values are all one.

A momentum matrix is nearly low-rank: a few directions take the whole step and the rest barely move. Orthogonalising
gives every direction the same say, which is steepest descent where a step is measured by its spectral norm. A few
products of matrices come close enough to the singular value decomposition. Embeddings, gains and biases are no maps
between streams; they stay with AdamW.

A filter (out, in, k, k) is the matrix (out, in k k), in its direction and in the scale sqrt(max(1, out / in k k)) of
its step. The released muon.py flattens it for the direction alone and takes the scale of the kernel's last two sides,
which is 1 for a square kernel: there, tall filters with out > in k k move less than here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_

from deltax import Part, UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.numerics.counts import at_least, below
from deltax.parts.training.roles import by_role

CUBIC = (1.5, -0.5, 0.0)  # converges to U V'
QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; hovers around one


def newton_schulz(x: Tensor, *, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC) -> Tensor:
    """Drive the singular values of matrices (..., R, C) towards one, keeping their singular vectors.

    x / |x| first; then, `steps` times, a x + b (x x') x + c (x x')^2 x, an odd polynomial of each singular value.
    """
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, steps=steps, coefficients=coefficients).mT
    a, b, c = coefficients
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon on every group, but AdamW on groups that come with `betas`. One optimizer, one state.

    M <- mu M + (1 - mu) G, then W <- (1 - lr decay) W - lr sqrt(max(1, R / C)) orthogonal((1 - mu) G + mu M), for
    matrices (R, C); what has more axes is flattened to (R, rest), as a filter is. `orthogonal` works in bf16 on GPUs
    that multiply it, else in the parameter's own precision.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        orthogonal: Callable[[Tensor], Tensor] = newton_schulz,
        dtype: torch.dtype | None = None,
    ):
        at_least(0, lr=lr, weight_decay=weight_decay)
        below(0, 1, momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": None})
        self.orthogonal, self.dtype = orthogonal, dtype

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises UserError for a group without `betas` that holds a parameter with fewer than two axes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"] if not group["betas"] else ():
            if p.ndim < 2:
                self.param_groups.pop()
                raise UserError(
                    f"Muon moves matrices, and a parameter has the shape {tuple(p.shape)}: give it in a group with "
                    f"betas, which AdamW moves"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["betas"]:
                self._adamw(moved, group)
            else:
                for p in moved:
                    self._muon(p, group)
        return loss

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        state, lr, mu = self.state[p], group["lr"], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1 - mu)
        update = p.grad.lerp(momentum, mu).flatten(1)
        update = self.orthogonal(update.to(self.dtype or _fast(update))).to(p.dtype)
        p.mul_(1 - lr * group["weight_decay"])
        p.add_(update.reshape(p.shape), alpha=-lr * max(1, update.shape[0] / update.shape[1]) ** 0.5)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                mean, square = torch.zeros_like(p), torch.zeros_like(p)
                step = torch.zeros((), device=p.device)
                self.state[p].update(step=step, mean=mean, square=square)
        means, squares, steps = ([self.state[p][k] for p in params] for k in ("mean", "square", "step"))
        adamw_(
            params,
            [p.grad for p in params],
            means,
            squares,
            [],
            steps,
            fused=group.get("fused", False),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def muon_and_adamw(
    model: nn.Module,
    *,
    lr: float = 3e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.1,
    spectral_lr: float = 0.02,
    momentum: float = 0.95,
) -> Muon:
    """Muon for matrices, with decay, at `spectral_lr`, how far a step moves in spectral norm; AdamW for the rest."""
    at_least(0, lr=lr, spectral_lr=spectral_lr, weight_decay=weight_decay)
    below(0, 1, beta1=beta1, beta2=beta2, momentum=momentum)
    roles = by_role(model)
    matrices = roles.pop("matrix", [])
    adam = {"lr": lr, "betas": (beta1, beta2), "weight_decay": 0.0, "fused": True}
    groups = [{"params": p, **adam} for p in roles.values() if p]
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    return Muon(groups, lr=spectral_lr, momentum=momentum)


def _fast(x: Tensor) -> torch.dtype:
    native = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else x.dtype


@paper(on=gpt, year=2024, url="https://kellerjordan.github.io/posts/muon/")
def muon(recipe: Part, *, spectral_lr: float = 0.02, momentum: float = 0.95) -> Part:
    return recipe.fill("optimizer", muon_and_adamw, spectral_lr=spectral_lr, momentum=momentum)
