"""Training on several processes, when `torchrun` started them; on one process every function here is the identity.

Parameters, gradients and optimizer state are sharded by FSDP2 (`fully_shard`), each process reads its own share of
every batch, and the losses are those of one process. Draws of an objective or of dropout are per share.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from deltax.errors import UserError


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun started, and leave them at the end. Yields whether this one speaks for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if size() > 1 else 0


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, spread over the processes block by block: no device ever holds all of it."""
    if size() == 1:
        return model.to(device)
    from torch.distributed.fsdp import fully_shard

    grid = distributed.init_device_mesh(device.type, (size(),))
    roles = {name: vars(p).get("role") for name, p in model.named_parameters()}
    scalars = {p for p in model.parameters() if p.ndim == 0}  # FSDP2 cannot shard them: each process keeps all
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
        parameter.register_hook(_mean_gradient)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=grid, ignored_params=scalars)
    fully_shard(model, mesh=grid, ignored_params=scalars)
    for name, parameter in model.named_parameters():
        if roles[name]:
            parameter.role = roles[name]
    return model


def _mean_gradient(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    distributed.all_reduce(gradient)
    return gradient / size()


def share(pieces: list) -> list:
    """Every n-th piece, beginning with this process's own. Raises UserError where there are too few to go round."""
    if len(pieces) % size():
        raise UserError(f"a batch in {len(pieces)} pieces does not divide over {size()} processes; use a larger batch")
    return pieces[rank() :: size()]


def mean(value: Tensor) -> float:
    """The mean over all processes."""
    if size() > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value /= size()
    return float(value)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from every process where it is sharded; each process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device_mesh.device_type), model.device_mesh, model.placements)
