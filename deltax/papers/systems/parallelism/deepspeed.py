"""DeepSpeed: System Optimizations Enable Training Deep Learning Models with Over 100 Billion Parameters.
Rasley, Rajbhandari, Ruwase, He, 2020. doi:10.1145/3394486.3406703

ZeRO with pipelines and tensor parallelism, but in one engine, whose optimizer state and steps are on the host.

Of 16 bytes a parameter, 12 are read once a step, with little arithmetic. The host stores masters and moments: gradients
go to it in half precision and new weights come back, 4 bytes a parameter and step, and a rank moves only its shard
(ZeRO-Offload, arXiv:2101.06840). The engine's other parts are `gpipe`, `megatron` and `zero`. `dx train` runs torch's
FSDP2 instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deltax import paper
from deltax.papers.systems.parallelism.gpipe import gpipe
from deltax.papers.systems.parallelism.megatron import megatron
from deltax.papers.systems.parallelism.zero import zero
from deltax.parts.distributed.ranks import Ranks


class Engine:
    """Weights (N,) in dtype `low` on a device, and sharded optimizers on the host, over a ring of ranks.

    `moved` counts the bytes that each rank has sent between device and host.
    """

    def __init__(
        self,
        weights: Tensor,
        ranks: int,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        device: torch.device | str = "cpu",
        low: torch.dtype = torch.float16,
    ):
        self.ring, self.low, self.device, self.count = Ranks(ranks), low, torch.device(device), weights.numel()
        padded = torch.nn.functional.pad(weights, (0, -self.count % ranks))
        # one master shard (N / P,) a rank, on the host
        self.masters = [shard.cpu().clone() for shard in padded.chunk(ranks)]
        self.optimizers = [optimizer([master]) for master in self.masters]
        self.weights = [padded.to(self.device, low) for _ in range(ranks)]
        self.moved = [0] * ranks

    def step(self, gradient: Callable[[int, Tensor], Tensor]) -> None:
        """Reduce-scatters the gradients, steps each shard on the host, and all-gathers the new weights."""
        whole = [gradient(rank, w[: self.count]).to(self.low) for rank, w in enumerate(self.weights)]
        shards = []
        for rank, summed in enumerate(self.ring.reduce_scatter(whole)):
            master = self.masters[rank]
            # gradient to the host, 2 bytes a parameter; mean in the master's dtype
            master.grad = self._move(rank, summed, "cpu").to(master.dtype) / self.ring.size
            self.optimizers[rank].step()
            # new weights to the device, 2 bytes a parameter
            shards.append(self._move(rank, master.detach().to(self.low), self.device))
        self.weights = self.ring.all_gather(shards)

    def _move(self, rank: int, tensor: Tensor, to: torch.device | str) -> Tensor:
        self.moved[rank] += tensor.numel() * tensor.element_size()
        return tensor.to(to)


@paper(on=(zero, gpipe, megatron), year=2020, url="https://doi.org/10.1145/3394486.3406703")
def deepspeed(
    weights: Tensor,
    ranks: int,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    device: torch.device | str = "cpu",
    low: torch.dtype = torch.float16,
) -> Engine:
    """An engine whose ranks step their shards of the weights (N,) on the host."""
    return Engine(weights, ranks, optimizer, device=device, low=low)


def place(rank: int, *, pipe: int, data: int, model: int) -> tuple[int, int, int]:
    """A rank's (stage, replica, shard): neighbouring ranks are tensor-parallel shards.

    Raises ValueError for a rank outside pipe * data * model.
    """
    if not 0 <= rank < pipe * data * model:
        raise ValueError(f"rank {rank} is outside {pipe} x {data} x {model}: give 0 to {pipe * data * model - 1}")
    # tensor-parallel shards are the fastest axis: they exchange the most
    return rank // (data * model), rank // model % data, rank % model
