"""LoRA: Low-Rank Adaptation of Large Language Models.
Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, 2021. arXiv:2106.09685

A trained transformer, but its weights are frozen and a product of two thin matrices is added to some of them.

What fine-tuning changes in a weight has low rank, so only so much is trained: W + (alpha / r) B A, with B zero at the
start. Optimizers keep state for A and B alone, a task is a file of a few megabytes, and after training the product is
added into W, so that nothing is left to compute. The paper adapts queries and values and leaves the rest.

The released code and peft put dropout on what A reads, and on nothing else; the paper's GPT-2 is tuned with a rate of
0.1, its GPT-3 without. Here there is none. peft keeps A and B in float32 beside weights of 16 bits.
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

    A (rank, D) starts uniform in +-1/sqrt(D), as released; the paper draws normal numbers. B (F, rank) starts at zero.
    The state of a bare inner loads too: A and B then stay what they are.
    """

    def __init__(self, dim: int, out: int, *, inner: Part, rank: int = 8, alpha: float = 8.0):
        super().__init__()
        if rank < 1:
            raise UserError(f"the rank of an adapter is at least 1, not {rank}")
        self.inner = inner(dim, out)
        self.scale = alpha / rank
        self.a = tag(nn.Parameter(torch.empty(rank, dim)), "matrix")
        self.b = tag(nn.Parameter(torch.empty(out, rank)), "matrix")
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_read_bare)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for those who look at it."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.inner(x))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """What is given where the inner gives y for x."""
        return y + self.scale * (x @ self.a.T @ self.b.T)

    def merged(self, weight: Tensor) -> Tensor:
        """The one weight (F, D) that does the same."""
        return weight + self.scale * (self.b @ self.a)


@needs(inside=("LoRA",))
def adapters_only(*, inner: Part, **facts: Any) -> nn.Module:
    """The inner model with everything frozen but its adapters."""
    model = told(inner, facts).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.a.requires_grad_()
            module.b.requires_grad_()
    return model


@torch.no_grad()
def merge(module: nn.Module) -> nn.Module:
    """Add every adapter into the weight it stands beside, take it out, and return the module. Frozen stays frozen.

    Where other modules hold the same weight, the adapted one gets its own copy: the outputs stay those of the adapted
    module. Raises UserError where there is no adapter, or where a weight cannot be added to.
    """
    adapters = {path: m for path, m in module.named_modules() if isinstance(m, LoRA)}
    if not adapters:
        raise UserError(f"{type(module).__name__} has no adapters to merge; lora.apply(module) adds them")
    for path, adapter in adapters.items():
        if not adapter.weight.is_floating_point():
            kind = str(adapter.weight.dtype).removeprefix("torch.")
            raise UserError(f"the weight beside {path} is {kind}, which cannot be added to; dequantize it first")
    for adapter in reversed(adapters.values()):
        surgery.write(module, [(_linear(adapter), adapter.merged(adapter.weight))])
    return surgery.unwrap(module, LoRA)


def _linear(adapter: LoRA) -> nn.Module:
    """The linear map that is adapted, through adapters inside adapters."""
    inner = adapter.inner
    return _linear(inner) if isinstance(inner, LoRA) else inner


def _read_bare(lora: LoRA, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if f"{prefix}a" not in state and f"{prefix}weight" in state:
        for key in [k for k in state if k.startswith(prefix)]:
            state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
        state[f"{prefix}a"], state[f"{prefix}b"] = lora.a, lora.b


@paper(on=gpt, arxiv="2106.09685", year=2021)
def lora(recipe: Part, *, rank: int = 8, alpha: float = 8.0) -> Part:
    for slot in ("query", "value"):
        recipe = recipe.wrap(slot, LoRA, rank=rank, alpha=alpha)
    return recipe.wrap("model", adapters_only)
