"""Swin Transformer V2: Scaling Up Capacity and Resolution. Liu, Hu, Lin, Yao, Xie, Wei, Ning, Cao, Zhang, Dong, Wei,
Guo, 2021. arXiv:2111.09883

A transformer, but the output of each branch is normalised before it is added to the residual stream.

Each branch then adds a vector whose root mean square is its norm's gain, so the residual stream grows at most linearly
with depth, and one layer with large outputs does not dominate. Swin V2 calls this res-post-norm, and OLMo 2 uses it.
The transformer's own post-norm, norm(x + f(x)), is `parts.model.stack.PostNorm`; GPT-2's pre-norm is x + f(norm(x)).
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
        # x + norm(f(x)); post-norm is norm(x + f(x)), pre-norm x + f(norm(x))
        return x + self.norm(branch(x))


@paper(on=(transformer, RMSNorm), year=2021, arxiv="2111.09883")
def post_norm(recipe: Part) -> Part:
    return recipe.fill("residual", BranchNorm)
