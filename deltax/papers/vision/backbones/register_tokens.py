"""Vision Transformers Need Registers. Darcet, Oquab, Mairal, Bojanowski, 2023. arXiv:2309.16588

A ViT, but with a few learned tokens more, which nobody reads at the end.

Large ViTs, trained long, take patches that show little, a stretch of sky, and keep there what concerns the whole image:
their norms stand out, and what the patch itself showed is lost. Registers are places of their own for that. They have
no position and are dropped after the last block; where in the sequence they stand does not matter, and here it is
behind the patches. The paper uses four.
"""

from dataclasses import replace

import torch
from torch import nn

from deltax import Part, UserError, paper
from deltax.contract import needs
from deltax.papers.vision.backbones.vit import vit
from deltax.parts.attention.context import Context
from deltax.parts.training.roles import tag
from deltax.shapes import Stream


@needs(outside=("PooledBlock",))
class WithRegisters(nn.Module):
    """The inner stack, on the stream and `registers` learned vectors behind it, which are then dropped.

    Stream (B, T, D) -> (B, T, .width). Positions, where ctx has any, are 0 for registers.
    """

    can_be_zero = ("registers",)
    hides_context = ("grid",)

    def __init__(self, dim: int, *, inner: Part, registers: int = 4, std: float = 0.02):
        super().__init__()
        self.std = std
        self.inner = inner(dim)
        self.width = self.inner.width
        self.registers = tag(nn.Parameter(torch.empty(registers, dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.registers, std=self.std)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state", "segments", "place")
        if ctx.positions is not None:
            ctx = replace(ctx, positions=nn.functional.pad(ctx.positions, (0, len(self.registers))))
        out = self.inner(torch.cat([x, self.registers.expand(len(x), -1, -1)], 1), ctx)
        if out.shape[1] != x.shape[1] + len(self.registers):
            raise UserError(
                "registers stand behind the patches to the end, and this stack pools or merges them: leave one out"
            )
        return out[:, : x.shape[1]]


@paper(on=vit, year=2023, arxiv="2309.16588")
def register_tokens(recipe: Part, *, registers: int = 4) -> Part:
    return recipe.wrap("stack", WithRegisters, registers=registers)
