"""Training on several processes, when `torchrun` started them; on one process every function here is the identity.

Parameters, gradients and optimizer state are sharded by FSDP2 (`fully_shard`), each process reads its own share of
every batch, and the losses are those of one process.
"""

from torch import Tensor, distributed, nn


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def shard(model: nn.Module) -> nn.Module:
    """The model with its parameters spread over the processes, block by block."""
    if size() > 1:
        from torch.distributed.fsdp import fully_shard

        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block)
        fully_shard(model)
    return model


def share(pieces: list) -> list:
    """Every n-th piece, beginning with this process's own."""
    return pieces[distributed.get_rank() :: size()] if size() > 1 else pieces


def mean(value: Tensor) -> float:
    """The mean over all processes."""
    if size() > 1:
        value = value.clone()
        distributed.all_reduce(value)
        value /= size()
    return float(value)
