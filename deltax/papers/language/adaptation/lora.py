"""LoRA: Low-Rank Adaptation of Large Language Models.
Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, 2021. arXiv:2106.09685

A trained transformer, but its weights are frozen and trainable products of two low-rank matrices are added to some.

Fine-tuning changes a weight by a matrix of low intrinsic rank, so only that is trained: W + (alpha / r) B A, with B
zero at the start. Optimizer state exists for A and B alone, and a task is stored in a few megabytes. After training the
product is added to W, so inference costs nothing extra. The paper adapts the query and value projections.

The released code and peft apply dropout to the input of A; the paper uses 0.1 for GPT-2 and none for GPT-3. Here there
is none. peft keeps A and B in float32 beside 16-bit weights.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.contract import needs
from deltax.papers.language.models.gpt import gpt
from deltax.parts.rewriting import surgery
from deltax.parts.training.roles import tag
from deltax.parts.training.run import told


class LoRA(nn.Module):
    """inner(x) + (alpha / rank) B A x (section 4.1). (..., D) -> (..., F).

    A (rank, D) starts uniform in +-1/sqrt(D), as released; the paper draws from a Gaussian. B (F, rank) starts at
    zero. The state dict of the inner map alone loads too, and leaves A and B unchanged.
    """

    def __init__(self, dim: int, out: int, *, inner: Part, rank: int = 8, alpha: float = 8.0):
        super().__init__()
        if rank < 1:
            raise UserError(f"lora needs a rank of at least 1, not {rank}: set rank=8, for example")
        self.inner = inner(dim, out)
        self.scale = alpha / rank  # alpha stays fixed when the rank changes, and the learning rate with it
        self.a = tag(nn.Parameter(torch.empty(rank, dim)), "matrix")
        self.b = tag(nn.Parameter(torch.empty(out, rank)), "matrix")
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_read_bare)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # uniform in +-1/sqrt(D)
        nn.init.zeros_(self.b)  # B A = 0: training starts at the pre-trained function

    @property
    def weight(self) -> Tensor:
        """The frozen weight W (F, D), under the name that torch's Linear has."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.inner(x))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (alpha / r) B A x, for y = inner(x)."""
        # through rank r: (..., D) -> (..., r) -> (..., F); B A itself would be as large as W
        return y + self.scale * (x @ self.a.T @ self.b.T)

    def merged(self, weight: Tensor) -> Tensor:
        """The merged weight (F, D)."""
        # W + (alpha / r) B A
        return weight + self.scale * (self.b @ self.a)


@paper(on=gpt, arxiv="2106.09685", year=2021)
def lora(recipe: Part, *, rank: int = 8, alpha: float = 8.0) -> Part:
    for slot in ("query", "value"):  # W_q and W_v, as in the paper; W_k, W_o and the MLP stay frozen
        recipe = recipe.wrap(slot, LoRA, rank=rank, alpha=alpha)
    return recipe.wrap("model", adapters_only)


@needs(inside=("LoRA",))
def adapters_only(*, inner: Part, **facts: Any) -> nn.Module:
    """The inner model, with all parameters frozen except A and B of its adapters."""
    model = told(inner, facts).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.a.requires_grad_()
            module.b.requires_grad_()
    return model


@torch.no_grad()
def merge(module: nn.Module) -> nn.Module:
    """Add (alpha / r) B A to each adapted weight, remove the adapters, and return the module. Frozen weights stay so.

    An adapted weight that other modules share is copied first, so that their outputs stay the same. Raises UserError
    for a module without adapters, or for a weight that is not floating point.
    """
    adapters = {path: m for path, m in module.named_modules() if isinstance(m, LoRA)}
    if not adapters:
        raise UserError(f"{type(module).__name__} has no adapters to merge; lora.apply(module) adds them")
    for path, adapter in adapters.items():
        if not adapter.weight.is_floating_point():
            kind = str(adapter.weight.dtype).removeprefix("torch.")
            raise UserError(f"cannot merge {path}: its weight is {kind}, not floating point; dequantize it first")
    for adapter in reversed(adapters.values()):  # the innermost of nested adapters first
        surgery.write(module, [(_linear(adapter), adapter.merged(adapter.weight))])
    return surgery.unwrap(module, LoRA)


def _linear(adapter: LoRA) -> nn.Module:
    """The linear map inside an adapter, or inside nested adapters."""
    inner = adapter.inner
    return _linear(inner) if isinstance(inner, LoRA) else inner


def _read_bare(lora: LoRA, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    # a checkpoint of the base model: its keys move under `inner`
    if f"{prefix}a" not in state and f"{prefix}weight" in state:
        for key in [k for k in state if k.startswith(prefix)]:
            state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
        state[f"{prefix}a"], state[f"{prefix}b"] = lora.a, lora.b
