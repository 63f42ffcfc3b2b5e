"""Dropout: A Simple Way to Prevent Neural Networks from Overfitting. Srivastava, Hinton, Krizhevsky, Sutskever,
Salakhutdinov, 2014.

A network, but in training each hidden unit is left out at random.

A unit that cannot count on its neighbours must be of use by itself, and what is used in the end is an average of all
the thinner networks that were trained. The paper halves the weights at test time where half of the units were dropped;
as everywhere since, here the units that stay are made larger in training instead, which is the same in expectation
and leaves the network that is used as it is. In a stack of blocks it is each branch that is thinned, as in the
Transformer (section 5.4 there).
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.parts.attention.context import takes_context


class Dropout(nn.Module):
    """x * mask / (1 - p) in training, with mask 1 at a chance of 1 - p; x otherwise. Any shape.

    Raises UserError where p is not in [0, 1).
    """

    def __init__(self, *, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"a share p of the units is dropped, 0 <= p < 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.rand_like(x, dtype=torch.float32) >= self.p
        return x * kept / (1 - self.p)


class BranchDropout(nn.Module):
    """dropout(inner(x)): a branch of a block, thinned before it joins the stream. (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, inner: Part, p: float = 0.1):
        super().__init__()
        self.inner, self.dropout = inner(dim), Dropout(p=p)
        self.takes_context = takes_context(self.inner)

    def forward(self, x: Tensor, ctx: object = None) -> Tensor:
        return self.dropout(self.inner(x, ctx) if self.takes_context else self.inner(x))


@paper(on=lenet_1989, year=2014, url="https://jmlr.org/papers/v15/srivastava14a.html")
def dropout(recipe: Part, *, p: float = 0.5) -> Part:
    """On hidden units where a network has a place for it; else on the branches of its blocks."""
    if "dropout" in recipe.slots():
        return recipe.fill("dropout", Dropout, p=p)
    return recipe.wrap("mixer", BranchDropout, p=p).wrap("mlp", BranchDropout, p=p)
