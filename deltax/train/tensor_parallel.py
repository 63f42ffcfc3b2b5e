"""Branches split over processes as Megatron-LM splits them: into columns, then rows, with DTensor.

An attention branch is split by heads, a feed-forward branch by hidden units; everything else is computed whole, and
alike, by every process. A branch that is neither, or whose maps are more than `nn.Linear`, is computed whole too.
"""

from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from deltax.errors import UserError
from deltax.parts.scores import of_heads

_PER_HEAD = {"project", "query_norm", "key_norm", "position", "score"}  # what works on each head by itself


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split every branch of the model that can be. Raises UserError where none can, or heads or units do not divide."""
    count = mesh.size()
    done = 0
    for name, module in model.named_modules():
        if _is_attention(module):
            _split_heads(module, mesh, name)
        elif _is_linear(module, "up", "down") and _owned(module) <= {"gate", "up", "down"}:
            if module.down.in_features % count:
                raise UserError(f"tp={count} does not divide the {module.down.in_features} hidden units of {name}")
            parallelize_module(module, mesh, {**_columns(module, "gate", "up"), "down": RowwiseParallel()})
        else:
            continue
        done += 1
    if not done:
        raise UserError(f"tp={count} finds no attention or feed-forward branch to split in {type(model).__name__}")


def _is_attention(module: nn.Module) -> bool:
    project = getattr(module, "project", None)
    return (
        project is not None
        and _is_linear(project, "query", "key", "value", "out")
        and hasattr(project, "heads")
        and _owned(project) <= {"query", "key", "value", "out"}
        and _owned(module) <= _PER_HEAD
        and hasattr(module, "score")
        and hasattr(module, "mask")
    )


def _split_heads(attention: Any, mesh: DeviceMesh, name: str) -> None:
    project, count = attention.project, mesh.size()
    if project.heads % count:
        raise UserError(f"tp={count} does not divide the {project.heads} heads of {name}; set heads to a multiple")
    parallelize_module(project, mesh, {**_columns(project, "query", "key", "value"), "out": RowwiseParallel()})
    project.heads //= count
    of_heads(attention, first=mesh.get_local_rank() * project.heads)
    for child, module in attention.named_children():
        if child != "project":
            for parameter in (p for p in module.parameters() if p.requires_grad):
                parameter.register_hook(lambda gradient: _sum(gradient, mesh.get_group()))


def _is_linear(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names) and all(
        isinstance(child, nn.Linear) for name, child in module.named_children() if name in ("gate", *names)
    )


def _owned(module: nn.Module) -> set[str]:
    """The children that have parameters, and the module's own."""
    children = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    return children | {name for name, _ in module.named_parameters(recurse=False)}


def _columns(module: nn.Module, *names: str) -> dict[str, ColwiseParallel]:
    return {name: ColwiseParallel() for name in names if isinstance(getattr(module, name, None), nn.Linear)}


def _sum(gradient: Tensor, group: Any) -> Tensor:
    gradient = gradient.clone()
    distributed.all_reduce(gradient, group=group)
    return gradient
