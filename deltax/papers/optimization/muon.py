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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_

from deltax import Part, UserError, claim, paper
from deltax.papers.language.gpt import gpt
from deltax.parts.counts import at_least, below
from deltax.parts.roles import by_role

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
        state, rate, mu = self.state[p], group["lr"], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1 - mu)
        update = p.grad.lerp(momentum, mu).flatten(1)
        update = self.orthogonal(update.to(self.dtype or _fast(update))).to(p.dtype)
        p.mul_(1 - rate * group["weight_decay"])
        p.add_(update.reshape(p.shape), alpha=-rate * max(1, update.shape[0] / update.shape[1]) ** 0.5)

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
    rate: float = 3e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    decay: float = 0.1,
    spectral_rate: float = 0.02,
    momentum: float = 0.95,
) -> Muon:
    """Muon for matrices, with decay, at `spectral_rate`, how far a step moves in spectral norm; AdamW for the rest."""
    at_least(0, rate=rate, spectral_rate=spectral_rate, decay=decay)
    below(0, 1, beta1=beta1, beta2=beta2, momentum=momentum)
    roles = by_role(model)
    matrices = roles.pop("matrix", [])
    adam = {"lr": rate, "betas": (beta1, beta2), "weight_decay": 0.0, "fused": True}
    groups = [{"params": p, **adam} for p in roles.values() if p]
    if matrices:
        groups.append({"params": matrices, "weight_decay": decay})
    return Muon(groups, lr=spectral_rate, momentum=momentum)


def _fast(x: Tensor) -> torch.dtype:
    native = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else x.dtype


@paper(on=gpt, year=2024, url="https://kellerjordan.github.io/posts/muon/")
def muon(recipe: Part, *, spectral_rate: float = 0.02, momentum: float = 0.95) -> Part:
    return recipe.fill("optimizer", muon_and_adamw, spectral_rate=spectral_rate, momentum=momentum)


@claim
def is_the_steepest_step():
    """Of all steps of spectral norm one, U V' goes furthest along the gradient U S V', and it is the one Muon takes
    once the iteration has converged.
    """
    torch.manual_seed(0)
    exact = partial(newton_schulz, steps=60, coefficients=CUBIC)
    for shape in ((7, 7), (5, 11), (13, 4)):
        weight, gradient, other = torch.randn(3, *shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        torch.testing.assert_close((gradient * (u @ v)).sum(), s.sum())
        assert (gradient * other / torch.linalg.matrix_norm(other, 2)).sum() < s.sum()
        parameter = nn.Parameter(weight.clone())
        parameter.grad = gradient
        Muon([parameter], lr=0.3, weight_decay=0.1, orthogonal=exact).step()
        scale = max(1, shape[0] / shape[1]) ** 0.5
        torch.testing.assert_close(parameter.data, 0.97 * weight - 0.3 * scale * u @ v, rtol=1e-9, atol=1e-9)


@claim
def a_filter_is_the_matrix_that_it_flattens_to():
    """A filter's step is its matrix's, the scale included: a tall one's is sqrt(out / in k k) times U V', where the
    released muon.py takes 1."""
    torch.manual_seed(0)
    exact = partial(newton_schulz, steps=60, coefficients=CUBIC)
    for shape in ((40, 2, 3, 3), (5, 4, 3, 3), (9, 2, 1, 5)):
        gradient = torch.randn(shape, dtype=torch.float64)
        whole, flat = nn.Parameter(torch.zeros_like(gradient)), nn.Parameter(torch.zeros_like(gradient).flatten(1))
        whole.grad, flat.grad = gradient.clone(), gradient.flatten(1)
        Muon([whole, flat], lr=0.1, orthogonal=exact).step()
        torch.testing.assert_close(whole.data.flatten(1), flat.data)
        scale = max(1.0, shape[0] / flat.shape[1]) ** 0.5
        sizes = torch.linalg.svdvals(flat.data)
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.1 * scale))


@claim
def five_steps_come_close_to_one():
    """Five quintic steps bring singular values of 0.6 % of the Frobenius norm or more into [0.68, 1.135], and multiply
    smaller shares by at most 485.

    Between 0.16 % and 0.6 % they land in [0.68, 1.21]: above the 1.13 that is often quoted.
    """
    torch.manual_seed(0)
    for shape in ((96, 96), (64, 64), (96, 384), (384, 96), (7, 50), (31, 64), (1, 9)):
        x = torch.randn(*shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        after = newton_schulz(x)
        values = (u.mT @ after @ v.mT).diagonal()
        torch.testing.assert_close(u * values @ v, after)
        share = s / s.norm()
        assert ((values > 0.68) & (values < 1.135))[share > 0.006].all()
        assert ((values > 0.68) & (values < 1.21))[share > 0.0016].all()
        assert (values <= 3.4445**5 * share + 1e-9).all()
    share = torch.logspace(-5, 0, 20_001, dtype=torch.float64)
    rest = (1 - share.square()).clamp(min=0).sqrt()
    values = newton_schulz(torch.diag_embed(torch.stack([share, rest], 1)))[:, 0, 0]
    assert values[share > 0.006].min() > 0.68 and values[share > 0.006].max() < 1.135
    assert 1.2 < values.max() < 1.21 and values[share < 0.0014].min() < 0.01


@claim
def the_size_of_the_gradient_is_forgotten():
    """A gradient a thousand times as large makes the same step."""
    torch.manual_seed(0)
    start, *gradients = torch.randn(4, 5, 8, dtype=torch.float64)
    ends = []
    for scale in (1.0, 1000.0):
        parameter = nn.Parameter(start.clone())
        optimizer = Muon([parameter])
        for gradient in gradients:
            parameter.grad = scale * gradient
            optimizer.step()
        ends.append(parameter.data)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ends[0], start, atol=1e-3)


@claim.parity(peer="torch.optim.AdamW")
def what_is_no_matrix_moves_as_under_adamw():
    """Embeddings, gains and biases get the steps of torch's AdamW, to the bit."""
    ours, theirs = (_model() for _ in range(2))
    rest = [p for n, p in theirs.named_parameters() if "1.weight" not in n]
    a, b = muon_and_adamw(ours), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(5):
        _random_gradients(ours, theirs)
        a.step()
        b.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) != ("1.weight" in name), name


@claim.parity(peer="torch.optim.Muon")
def equals_torch():
    """Ten steps with momentum, decay and a changing rate, on wide, tall and square matrices, are those of torch's Muon;
    its iteration works in bf16, and that near the two iterations are.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    theirs_orthogonal = lambda x: _zeropower_via_newtonschulz(x, QUINTIC, 5, 1e-7)
    shapes = ((7, 7), (5, 13), (17, 3), (1, 6), (9, 1))
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(newton_schulz(x), theirs_orthogonal(x).float(), rtol=0, atol=0.02)
    ours, theirs = ([nn.Parameter(torch.randn(s)) for s in shapes] for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    a = Muon(ours, orthogonal=theirs_orthogonal, **settings)
    b = torch.optim.Muon(theirs, **settings)
    start = [p.detach().clone() for p in ours]
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10 ** (step % 3 - 1)
            q.grad = p.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 20)
            optimizer.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-5, atol=1e-6)
        assert (p - first).abs().max() > 0.1


@claim.measured(paper="NanoGPT speedrun 1.35 times as fast as with AdamW (README)")
def better_than_adamw(lab):
    """Tuned alike, gpt + muon ends with a lower loss than gpt under AdamW."""
    return lab.compare("gpt", "gpt+muon").better


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def _random_gradients(*models: nn.Module) -> None:
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn_like(parameters[0])
        for p in parameters:
            p.grad = gradient.clone()
