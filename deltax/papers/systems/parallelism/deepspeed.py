"""DeepSpeed: System Optimizations Enable Training Deep Learning Models with Over 100 Billion Parameters.
Rasley, Rajbhandari, Ruwase, He, 2020. doi:10.1145/3394486.3406703

ZeRO, but in one engine with pipelines and tensor parallelism, and with the optimizer where memory is cheap: the host.

Of 16 bytes a parameter, 12 are read once a step, by arithmetic so light that the host can do it. So the masters and
the moments live there: gradients go up in half precision, new weights come down, 4 bytes a parameter and step, and a
rank moves only its shard (ZeRO-Offload, arXiv:2101.06840). The rest of the library's engine is `gpipe`, `megatron`
and `zero`; here is how it numbers its ranks. `dx train` runs torch's FSDP2 in its place.
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
    """Weights (N,) in `low` precision on a device, sharded optimizers on the host, and a ring of ranks between.

    `moved` counts the bytes each rank has sent between device and host.
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
        self.masters = [shard.cpu().clone() for shard in padded.chunk(ranks)]
        self.optimizers = [optimizer([master]) for master in self.masters]
        self.weights = [padded.to(self.device, low) for _ in range(ranks)]
        self.moved = [0] * ranks

    def step(self, gradient: Callable[[int, Tensor], Tensor]) -> None:
        """Scatter the sum of the ranks' gradients, step each shard on the host, gather the new weights."""
        whole = [gradient(rank, w[: self.count]).to(self.low) for rank, w in enumerate(self.weights)]
        shards = []
        for rank, summed in enumerate(self.ring.reduce_scatter(whole)):
            master = self.masters[rank]
            master.grad = self._move(rank, summed, "cpu").to(master.dtype) / self.ring.size
            self.optimizers[rank].step()
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
    """A rank's stage, replica and shard: neighbours are shards of one tensor, the farthest apart stages of one pipe.

    Raises ValueError for a rank outside pipe * data * model.
    """
    if not 0 <= rank < pipe * data * model:
        raise ValueError(f"rank {rank} is not among the {pipe * data * model} of {pipe} x {data} x {model}")
    return rank // (data * model), rank // model % data, rank % model
