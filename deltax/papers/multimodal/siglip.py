"""Sigmoid Loss for Language Image Pre-Training. Zhai, Mustafa, Kolesnikov, Beyer, 2023. arXiv:2303.15343

CLIP, but the loss is an independent sigmoid for each image-text pair, not a softmax over the batch.

Without a softmax, no device has to hold all N x N logits: text embeddings pass around a ring of devices, and each
device adds its part of the loss. Most pairs are negatives, so a learned bias starts at -10 and the scale at 10:
initially almost all negatives are classified correctly, and the loss starts with the positives. The sum over pairs is
divided by images, not by pairs. The released models read the last position of a text encoder without causal mask, and
pool an image's patches by attention: `released_towers`.
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


@paper(on=clip, year=2023, arxiv="2303.15343")
def siglip(recipe: Part, *, bias: float = -10.0) -> Part:
    # both the loss and the logits' bias change
    return recipe.fill("objective", pair_sigmoid).fill("logits", Biased, bias=bias)


def _surprise(logits: Float[Tensor, "N M"], belong: Tensor) -> PerExample:
    logits = logits.float() if logits.dtype is not torch.float64 else logits
    return -nn.functional.logsigmoid(torch.where(belong, logits, -logits)).sum(1)


class Biased(Temperature):
    """A `Temperature` with a learned bias added, initially `bias`. (N, M) -> (N, M)."""

    def __init__(self, *, start: float = 0.1, most: float = math.inf, bias: float = -10.0):
        self.begin = bias
        super().__init__(start=start, most=most)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # b, initially -10
        self.bias = tag(nn.Parameter(torch.tensor(float(self.begin))), "vector")

    def forward(self, cosines: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        # t x_i.y_j + b
        return super().forward(cosines) + self.bias


def each_alone(logits: Float[Tensor, "N N"]) -> PerExample:
    """-log sigmoid(z_ij logit_ij) with z = 1 on the diagonal and -1 elsewhere, summed over each row (Eq. 1)."""
    return _surprise(logits, torch.eye(len(logits), dtype=torch.bool, device=logits.device))


@needs("images", "texts", model=PAIRS_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def pair_sigmoid(model: nn.Module, batch: PairBatch) -> PerExample:
    """`each_alone` of a batch."""
    return each_alone(model(batch.images, batch.texts))


class _AroundTheRing(torch.autograd.Function):
    """Texts and their gradients pass around the ring; after `size` hops both are complete."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
        mine = [t.detach().requires_grad_() for t in (images, scale, bias)]
        totals = [torch.zeros_like(t) for t in mine]
        loss, held, slope = images.new_zeros(()), texts.detach(), torch.zeros_like(texts)
        for hop in range(ring.size):
            # positives are only among the rank's own texts
            belong = torch.eye(len(images), dtype=torch.bool, device=images.device) & (hop == 0)
            # gradients of each block now, so that its N x N logits can be freed
            with torch.enable_grad():
                guest = held.detach().requires_grad_()
                part_ = _surprise(similarity(mine[0], guest) * mine[1] + mine[2], belong).sum()
                *own, of_guest = torch.autograd.grad(part_, [*mine, guest])
            loss, slope = loss + part_.detach(), slope + of_guest
            totals = [a + b for a, b in zip(totals, own, strict=True)]
            held, slope = ring.pass_on((held, slope))()  # to the next rank
        ctx.save_for_backward(totals[0], slope, *totals[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, *weight: Tensor) -> Any:
        # the gradients were computed in the forward pass
        return (*(weight[0] * slope for slope in ctx.saved_tensors), None)


def around_the_ring(
    images: Float[Tensor, "N K"], texts: Float[Tensor, "N K"], scale: Tensor, bias: Tensor, ring: Ring
) -> Float[Tensor, ""]:
    """The sum of `each_alone` for this rank's images against all texts; N x N logits at a time (Figure 1).

    All ranks have the same number of pairs and weight their losses equally: a text's gradient sums over all ranks. The
    gradients of scale and bias are this rank's part.
    """
    return _AroundTheRing.apply(images, texts, scale, bias, ring)


class AttentionPool(nn.Module):
    """Attention of one learned query to the stream, plus an MLP branch. Stream (B, T, D) -> (B, D)."""

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
