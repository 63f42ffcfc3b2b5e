"""Beyond Top-K: Structured Sparsification for Compression in Pipeline Parallel.
Ramasinghe, Ajanthan, Avraham, Zuo, Long, 2025.

Top-k compression, but between the stages of a pipeline, and whole columns of the activations go, not single entries.

An activation that is cut has no next message to which the rest could be added, so what a stage drops is lost to all
that follow. Columns, features of the stream, keep the space that the rest spans, cost one bit each to name, and the
gradient comes back in the same ones. Only the abstract was to be had: here the columns with the largest norm over the
batch are kept, the best choice of so many columns, with no correction of the rest. Every block is a stage and what
enters it is cut, in evaluation too. The choice looks at the whole batch, later positions included, so that a language
model is scored on choices that depend on its targets: wherever its score is printed, a note says so.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.systems.decentralized.topk_compression import topk_compression
from deltax.papers.systems.parallelism.gpipe import gpipe
from deltax.parts.attention.context import Context
from deltax.parts.training.objectives import mixes
from deltax.shapes import Stream


@mixes("the columns that cross a cut are chosen for a whole piece")
def largest_columns(x: Stream, keep: float) -> Tensor:
    """True for the share of features with the largest norm over all positions, at least one. (B, T, D) -> (D,)."""
    norms = x.detach().flatten(0, -2).norm(dim=0)
    return _marked(norms, max(1, round(keep * len(norms))))


largest_columns.looks_ahead = "the columns to send are chosen by their norm over all positions, later ones included"


def random_columns(x: Stream, keep: float) -> Tensor:
    """True for a random share of features. (B, T, D) -> (D,)."""
    return _marked(torch.rand(x.shape[-1], device=x.device), max(1, round(keep * x.shape[-1])))


@mixes("the entries that cross a cut are chosen for a whole piece")
def largest_entries(x: Stream, keep: float) -> Tensor:
    """True for the entries that are largest in absolute value, as many as cost the bytes of a share `keep` of columns:
    half as many, since each must be named by 4 bytes beside its 4. (B, T, D) -> (B, T, D).
    """
    sizes = x.detach().abs().flatten()
    return _marked(sizes, max(1, round(keep * len(sizes) / 2))).view(x.shape)


largest_entries.looks_ahead = "the entries to send are chosen among those of all positions, later ones included"


class Cut(nn.Module):
    """A block whose input comes over a slow line: what choose(x, keep) does not mark is zero, and so is its gradient.

    Stream (B, T, D) -> (B, T, D). Raises UserError for a share outside (0, 1].
    """

    def __init__(self, dim: int, *, inner: Part, keep: float = 0.1, choose: Part = part(largest_columns)):
        super().__init__()
        if not 0 < keep <= 1:
            raise UserError(f"keep is the share of columns that is sent, above 0 and at most 1, not {keep}")
        self.inner, self.keep, self.choose = inner(dim), keep, choose

    def forward(self, x: Stream, ctx: Context) -> Stream:
        ctx.refuse(self, "state")  # what is kept depends on all positions of the sequence
        return self.inner(x * self.choose(x, self.keep), ctx)


def cut_bytes(positions: int, dim: int, keep: float, *, width: int = 4) -> int:
    """Bytes one way over a cut: the kept columns, and one bit for each feature."""
    return positions * max(1, round(keep * dim)) * width + -(-dim // 8)


@paper(on=(topk_compression, gpipe), url="https://openreview.net/forum?id=UyPDg7ksTM", year=2025)
def beyond_topk(recipe: Part, *, keep: float = 0.1) -> Part:
    return recipe.wrap("block", Cut, keep=keep)


def _marked(sizes: Tensor, count: int) -> Tensor:
    """True at the `count` largest. (N,) -> (N,)."""
    return torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, sizes.topk(count).indices, True)
