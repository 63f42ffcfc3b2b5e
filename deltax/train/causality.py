"""A next-token model is refused where a logit depends on a later token: it would read the targets that it is scored on.

The model is built once more at random weights, and read in evaluation mode with some of its last tokens changed. What a
part does by design it declares (`looks_ahead`, see `deltax.contract`); such a model is not refused, and its score is
printed with that sentence.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deltax import contract, kernels
from deltax.errors import UserError
from deltax.parts.training.run import Run, build_model
from deltax.recipe import Part
from deltax.slots import SLOTS

SMALL = 1e-4  # of the largest change of a logit: what rounding may change earlier logits by


def check(run: Run, task: Any, title: str) -> None:
    """Raise UserError, naming the recipe and the slot, where a logit of a next-token model depends on a later token.

    Each model is checked once, on the CPU; no stream of random numbers moves.
    """
    if contract.interface(run.model) not in contract.CAUSAL or contract.looks_ahead(run.model):
        return
    if found := _leak(kernels.reference(run.model), run.task, _Task(task)):
        raise UserError(
            f"{title} predicts tokens that it can read: {found} looks at later positions; put a causal part there"
        )


class _Task:
    """A task as it is passed to a cached function: it is known by its part."""

    def __init__(self, task: Any):
        self.task = task

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Task)


@lru_cache(maxsize=256)
def _leak(model: Part, _: Part, task: _Task) -> str:
    """The part by which the logits depend on later tokens, as a phrase; nothing where they do not."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = build_model(model, task.task.task_spec).eval()
        batch = task.task.batch(0, size=2, seed=0)
        *source, tokens, _ = (tensor[:1] for tensor in batch)
        if any(is_lazy(parameter) for parameter in network.parameters()):
            network(*source, tokens)
        _at_random(network)
    time, vocab = tokens.shape[1], task.task.task_spec["vocab"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = network(*source, tokens)
        for first in {time - 1, time // 2} - {0}:
            changed = torch.cat([tokens[:, :first], (tokens[:, first:] + 1) % vocab], 1)
            if _differs(before, network(*source, changed), first):
                return _culprit(network, (*source, tokens), (*source, changed), first)
    return ""


def _at_random(network: nn.Module) -> None:
    """Draw every parameter, so that no branch that starts at zero hides a leak."""
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.normal_(std=std, generator=draw)


def _differs(before: Tensor, after: Tensor, first: int) -> bool:
    change = (after - before).abs()
    return bool(change[:, :first].max() > SMALL * change.max())


def _culprit(network: nn.Module, read: tuple[Tensor, ...], changed: tuple[Tensor, ...], first: int) -> str:
    """The innermost module whose output changes at positions where its input does not."""
    time, seen = read[-1].shape[1], []

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, given, gave: seen.append((name, module, given[:1], gave)))

    hooks = [watch(name, module) for name, module in network.named_modules() if name]
    passes = []
    for tokens in (read, changed):
        seen = []
        network(*tokens)
        passes.append(seen)
    for hook in hooks:
        hook.remove()
    for (name, module, given, gave), (_, _, given_then, gave_then) in zip(*passes):
        streams = [*given, *given_then, gave, gave_then]
        if all(isinstance(t, Tensor) and t.ndim >= 2 and t.shape[1] == time for t in streams) and given:
            unmoved = torch.equal(given[0][:, :first], given_then[0][:, :first])
            if unmoved and gave.is_floating_point() and _differs(gave, gave_then, first):
                steps = [step.removesuffix("s") if step == "blocks" else step for step in name.split(".")]
                slot = next((step for step in reversed(steps) if step in SLOTS), "module")
                return f"the {slot} {type(module).__name__} (at model.{name})"
    return f"a part of {type(network).__name__}"
