"""MuLoCo: Muon is a Practical Inner Optimizer for DiLoCo.
Therien, Huang, Defazio, Rish, Belilovsky, 2025. arXiv:2505.23725

DiLoCo, but Muon takes the inner steps, and pseudo-gradients are sent in 2 bits, what is lost being added to the next.

Muon's steps have all singular values alike, and so have the differences they add up to: a coarse code keeps more of
them. The code here is the paper's statistical one, each block's numbers in quarters by size and each quarter as its
mean; what it loses stays with the worker (error feedback), as in top-k compression. `gpt + muon + diloco` is MuLoCo
without the compression.
"""

import torch
from torch import Tensor

from deltax import Part, UserError, paper, part
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.papers.optimization.optimizers.muon import muon, muon_and_adamw
from deltax.papers.systems.decentralized.topk_compression import Remembered, topk_compression
from deltax.parts.distributed.exchange import Payload
from deltax.recipe import takes


class TwoBits:
    """Each number as the quarter it falls into among the `block` numbers around it, decoded as the quarter's mean.

    A message has a quarter of a byte a number, and 4 float32 a block; the last block is padded with its last number.
    """

    def __init__(self, *, block: int = 1024):
        if block < 4 or block % 4:
            raise UserError(f"a block is a multiple of 4 numbers, not {block}")
        self.block = block

    def encode(self, vector: Tensor) -> Payload:
        short = -len(vector) % self.block
        rows = torch.cat([vector, vector[-1:].expand(short)]).view(-1, self.block)
        order = rows.argsort(1)
        quarter = torch.empty_like(order).scatter_(1, order, torch.arange(self.block).expand_as(order))
        quarter = quarter * 4 // self.block
        levels = rows.gather(1, order).view(len(rows), 4, -1).mean(2)
        bits = quarter.view(-1, 4) * torch.tensor([1, 4, 16, 64])
        size = torch.tensor([len(vector)], dtype=torch.int32)
        return bits.sum(1).to(torch.uint8), levels.float(), size

    def decode(self, payload: Payload) -> Tensor:
        bits, levels, size = payload
        quarter = (bits.long()[:, None] // torch.tensor([1, 4, 16, 64])) % 4
        return levels.gather(1, quarter.view(len(levels), -1)).flatten()[: int(size)]


@paper(on=(diloco, muon, topk_compression), arxiv="2505.23725", year=2025, whole="gpt+diloco")
def muloco(recipe: Part, *, spectral_lr: float = 0.02, memory: float = 1.0) -> Part:
    if "outer" not in recipe.slots():
        raise UserError("muloco changes DiLoCo: write gpt+diloco+muloco")
    kept = {k: v for k, v in recipe["optimizer.inner"].kwargs if k in takes(muon_and_adamw)}
    inner = part(muon_and_adamw, **kept, spectral_lr=spectral_lr)
    return recipe.put("optimizer.inner", inner).fill("exchange", part(Remembered, code=part(TwoBits), memory=memory))
