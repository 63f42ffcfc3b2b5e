"""Sigmoid Loss for Language Image Pre-Training. Zhai, Mustafa, Kolesnikov, Beyer, 2023. arXiv:2303.15343

CLIP, but every image and every text of a batch are asked alone whether they belong together.

One yes or no a pair needs no sum over all the others, so no machine needs to hold all N x N scores: texts go round
from machine to machine, and each adds its part. Most answers are no, so a learned bias starts at -10 and the scale at
10: at the start nearly all pairs are told apart already, and the loss begins with the pairs that belong together. The
sum over pairs is divided by images, not by pairs. The released models also read the last place of a text that sees
all of itself, and gather an image's patches by attention: `released_towers`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import PAIRS_TO_LOGITS, needs
from deltax.papers.language.attention.softmax_attention import CrossAttention
from deltax.papers.multimodal.clip import clip
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.distributed.ring import Ring
from deltax.parts.model.mlp import MLP
from deltax.parts.model.pairs import Temperature
from deltax.parts.model.patches import Pooled
from deltax.parts.model.stack import PreNorm
from deltax.parts.numerics.precision import similarity
from deltax.parts.training.objectives import mixes
from deltax.parts.training.roles import tag
from deltax.shapes import PerExample, Stream
from deltax.tasks.multimodal.pairs import PairBatch


class Biased(Temperature):
    """A `Temperature` and a learned bias, added last, from `bias` on. (N, M) -> (N, M)."""

    def __init__(self, *, start: float = 0.1, most: float = math.inf, bias: float = -10.0):
        self.begin = bias
        super().__init__(start=start, most=most)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.bias = tag(nn.Parameter(torch.tensor(float(self.begin))), "vector")

    def forward(self, cosines: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        return super().forward(cosines) + self.bias


def each_alone(logits: Float[Tensor, "N N"]) -> PerExample:
    """-log of the chance of the right answer, summed over each row: yes on the diagonal, no elsewhere (Eq. 1)."""
    return _surprise(logits, torch.eye(len(logits), dtype=torch.bool, device=logits.device))


def _surprise(logits: Float[Tensor, "N M"], belong: Tensor) -> PerExample:
    logits = logits.float() if logits.dtype is not torch.float64 else logits
    return -nn.functional.logsigmoid(torch.where(belong, logits, -logits)).sum(1)


@needs("images", "texts", model=PAIRS_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def pair_sigmoid(model: nn.Module, batch: PairBatch) -> PerExample:
    """`each_alone` of a batch."""
    return each_alone(model(batch.images, batch.texts))


class _AroundTheRing(torch.autograd.Function):
    """Texts go round with their gradient beside them; when they are home again both are complete."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
        mine = [t.detach().requires_grad_() for t in (images, scale, bias)]
        totals = [torch.zeros_like(t) for t in mine]
        loss, held, slope = images.new_zeros(()), texts.detach(), torch.zeros_like(texts)
        for hop in range(ring.size):
            belong = torch.eye(len(images), dtype=torch.bool, device=images.device) & (hop == 0)
            with torch.enable_grad():
                guest = held.detach().requires_grad_()
                part_ = _surprise(similarity(mine[0], guest) * mine[1] + mine[2], belong).sum()
                *own, of_guest = torch.autograd.grad(part_, [*mine, guest])
            loss, slope = loss + part_.detach(), slope + of_guest
            totals = [a + b for a, b in zip(totals, own, strict=True)]
            held, slope = ring.pass_on((held, slope))()
        ctx.save_for_backward(totals[0], slope, *totals[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, *weight: Tensor) -> Any:
        return (*(weight[0] * slope for slope in ctx.saved_tensors), None)


def around_the_ring(
    images: Float[Tensor, "N K"], texts: Float[Tensor, "N K"], scale: Tensor, bias: Tensor, ring: Ring
) -> Float[Tensor, ""]:
    """The sum of `each_alone` over this member's images, against the texts of all; N x N scores at a time (Figure 1).

    All members have as many pairs, and weigh their losses alike: a text's gradient is of all members' losses. The
    gradients of scale and bias are this member's share.
    """
    return _AroundTheRing.apply(images, texts, scale, bias, ring)


class AttentionPool(nn.Module):
    """One learned query asks the stream, and a branch of MLP is added. Stream (B, T, D) -> (B, D)."""

    def __init__(self, dim: int, *, heads: int = 3, norm: Part = part(LayerNorm), mlp: Part = part(MLP)):
        super().__init__()
        self.probe = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.attention = CrossAttention(dim, heads=heads)
        self.mlp_residual, self.mlp = PreNorm(dim, norm=norm), mlp(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.probe)

    def forward(self, x: Stream) -> Pooled:
        asked = self.attention(self.probe.expand(len(x), 1, -1), Context(memory=x))
        return self.mlp_residual(asked, self.mlp)[:, 0]


@paper(on=clip, year=2023, arxiv="2303.15343")
def siglip(recipe: Part, *, bias: float = -10.0) -> Part:
    return recipe.fill("objective", pair_sigmoid).fill("logits", Biased, bias=bias)
