"""Swin Transformer V2: Scaling Up Capacity and Resolution. Liu, Hu, Lin, Yao, Xie, Wei, Ning, Cao, Zhang, Dong, Wei,
Guo, 2021. arXiv:2111.09883

A transformer, but each branch is normalised where it ends, before it is added; the stream itself never is.

What a branch adds then has the size of its norm's gain, whatever the branch does, so the stream grows at most
linearly with depth and one wild layer cannot drown the others. Swin V2 calls it res-post-norm; OLMo 2 reorders its
norms so. It is neither the post-norm of the transformer, norm(x + f(x)), which is `parts.model.stack.PostNorm`, nor
the pre-norm of GPT-2.
"""

from collections.abc import Callable

from torch import nn

from deltax import Part, paper
from deltax.papers.language.models.transformer import transformer
from deltax.papers.language.norm.rms_norm import RMSNorm
from deltax.shapes import Stream


class BranchNorm(nn.Module):
    """x + norm(branch(x)). Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__()
        self.norm = norm(dim)

    def forward(self, x: Stream, branch: Callable[[Stream], Stream]) -> Stream:
        return x + self.norm(branch(x))


@paper(on=(transformer, RMSNorm), year=2021, arxiv="2111.09883")
def post_norm(recipe: Part) -> Part:
    return recipe.fill("residual", BranchNorm)
