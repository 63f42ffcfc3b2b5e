"""Beyond Top-K: Structured Sparsification for Compression in Pipeline Parallel.
Ramasinghe, Ajanthan, Avraham, Zuo, Long, 2025.

Top-k compression, but between pipeline stages, and it sends whole columns of the activations, not single entries.

An activation has no next message, so entries that a stage drops are lost. Columns (features of the stream) keep the
space that the rest spans, cost one bit each to name, and the gradient returns in the same columns. Only the abstract
was available. Here the columns of largest norm over the batch are sent, the best choice of that many, with no
correction of the rest. Every block is a stage, also in evaluation. The choice depends on all positions, later ones
included, and so on a language model's targets; a note says so wherever its score is printed.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.contract import needs
from deltax.papers.systems.decentralized.topk_compression import topk_compression
from deltax.papers.systems.parallelism.gpipe import gpipe
from deltax.parts.attention.context import Context
from deltax.parts.training.objectives import mixes
from deltax.shapes import Stream


@mixes("the columns that cross a cut are chosen for a whole piece")
def largest_columns(x: Stream, keep: float) -> Tensor:
    """True for a share `keep` of features, at least one, with the largest norms. (B, T, D) -> (D,)."""
    # one norm a feature, over batch and positions
    norms = x.detach().flatten(0, -2).norm(dim=0)
    return _marked(norms, max(1, round(keep * len(norms))))


largest_columns.looks_ahead = "the columns to send are chosen by their norm over all positions, later ones included"


def random_columns(x: Stream, keep: float) -> Tensor:
    """True for a random share `keep` of features. (B, T, D) -> (D,)."""
    return _marked(torch.rand(x.shape[-1], device=x.device), max(1, round(keep * x.shape[-1])))


@mixes("the entries that cross a cut are chosen for a whole piece")
def largest_entries(x: Stream, keep: float) -> Tensor:
    """True for the entries of largest magnitude that cost as many bytes as a share `keep` of columns. (B, T, D) -> (B,
    T, D).
    """
    # 4 bytes of value and 4 of index an entry: half as many as columns have entries
    sizes = x.detach().abs().flatten()
    return _marked(sizes, max(1, round(keep * len(sizes) / 2))).view(x.shape)


largest_entries.looks_ahead = "the entries to send are chosen among those of all positions, later ones included"


@needs(outside=("PixelBlock",))  # its stream (B, D) has no positions to choose columns over
class Cut(nn.Module):
    """A block whose input is compressed: entries that choose(x, keep) does not mark are zero, and so is their gradient.

    Stream (B, T, D) -> (B, T, D). Raises UserError for a share outside (0, 1].
    """

    def __init__(self, dim: int, *, inner: Part, keep: float = 0.1, choose: Part = part(largest_columns)):
        super().__init__()
        if not 0 < keep <= 1:
            raise UserError(f"keep must be a share of columns in (0, 1], not {keep}: choose 0.1 for 90 % compression")
        self.inner, self.keep, self.choose = inner(dim), keep, choose

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state")  # what is kept depends on all positions of the sequence
        # the product with the mask also cuts the gradient, to the same columns
        return self.inner(x * self.choose(x, self.keep), ctx)


def cut_bytes(positions: int, dim: int, keep: float, *, width: int = 4) -> int:
    """Bytes of one message over a cut: the kept columns, and one bit for each feature."""
    # values, and a bit mask of D bits
    return positions * max(1, round(keep * dim)) * width + -(-dim // 8)


@paper(on=(topk_compression, gpipe), url="https://openreview.net/forum?id=UyPDg7ksTM", year=2025)
def beyond_topk(recipe: Part, *, keep: float = 0.1) -> Part:
    return recipe.wrap("block", Cut, keep=keep)


def _marked(sizes: Tensor, count: int) -> Tensor:
    """True at the `count` largest. (N,) -> (N,)."""
    return torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, sizes.topk(count).indices, True)
