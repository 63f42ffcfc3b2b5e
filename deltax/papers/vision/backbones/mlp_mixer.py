"""MLP-Mixer: An all-MLP Architecture for Vision. Tolstikhin, Houlsby, Kolesnikov, Beyer, Zhai, Unterthiner, Yung,
Steiner, Keysers, Uszkoreit, Lucic, Dosovitskiy, 2021. arXiv:2105.01601

A ViT, but patches are mixed by an MLP along the patch axis, with no attention.

The MLP that ViT has for features is used a second time with the axes swapped: every feature is a vector over patches,
and all features share one MLP. Each patch has its own weights in it, so positions need no vectors, and the number of
patches is fixed when the model is built. B/16 has 12 blocks of width 768 on 196 patches, with 384 hidden in the mixing.
"""

from torch import nn

from deltax import Part, UserError, paper, part
from deltax.papers.vision.backbones.vit import mean_pooled, vit
from deltax.parts.attention.context import Context
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import XavierLinear
from deltax.parts.model.mlp import MLP, gelu
from deltax.shapes import Stream


class TokenMixing(nn.Module):
    """An MLP over the patches, the same for every feature (Eq. 1). Stream (B, T, D) -> (B, T, D), T = `context`.

    `context` is the number of patches; an image with another number raises UserError.
    """

    def __init__(self, dim: int, *, context: int = 16, mlp: Part = part(MLP, widen=2, activation=gelu)):
        super().__init__()
        self.context = context
        self.mlp = mlp(context)

    def forward(self, x: Stream, ctx: Context | None = None) -> Stream:
        (ctx or Context()).refuse(self, "state", "segments", "place")
        if x.shape[1] != self.context:
            raise UserError(
                f"{x.shape[1]} patches for a mixer of {self.context}: write mlp_mixer(context={x.shape[1]})"
            )
        return self.mlp(x.mT).mT


@paper(on=vit, year=2021, arxiv="2105.01601")
def mlp_mixer(recipe: Part, *, context: int = 16, widen: float = 2) -> Part:
    mlp = part(MLP, widen=widen, up=XavierLinear, activation=gelu, down=XavierLinear)
    recipe = mean_pooled(recipe).fill("position", Identity)
    return recipe.fill("mixer", TokenMixing, context=context, mlp=mlp)
