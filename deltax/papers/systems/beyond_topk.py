"""Beyond Top-K: Structured Sparsification for Compression in Pipeline Parallel.
Ramasinghe, Ajanthan, Avraham, Zuo, Long, 2025.

Top-k compression, but between the stages of a pipeline, and whole columns of the activations go, not single entries.

An activation that is cut has no next message to which the rest could be added, so what a stage drops is lost to all
that follow. Columns, features of the stream, keep the space that the rest spans, cost one bit each to name, and the
gradient comes back in the same ones. Only the abstract was to be had: here the columns with the largest norm over the
batch are kept, the best choice of so many columns, with no correction of the rest. Every block is a stage and what
enters it is cut, in evaluation too. The choice looks at the whole batch, later positions included.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.papers.language.gpt import gpt
from deltax.papers.systems.gpipe import gpipe
from deltax.papers.systems.topk_compression import topk_compression
from deltax.parts.context import Context
from deltax.parts.objectives import mixes
from deltax.shapes import Stream


@mixes("the columns that cross a cut are chosen for a whole piece")
def largest_columns(x: Stream, keep: float) -> Tensor:
    """True for the share of features with the largest norm over all positions, at least one. (B, T, D) -> (D,)."""
    norms = x.detach().flatten(0, -2).norm(dim=0)
    return _marked(norms, max(1, round(keep * len(norms))))


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
        return self.inner(x * self.choose(x, self.keep), ctx)


def cut_bytes(positions: int, dim: int, keep: float, *, width: int = 4) -> int:
    """Bytes one way over a cut: the kept columns, and one bit for each feature."""
    return positions * max(1, round(keep * dim)) * width + -(-dim // 8)


@paper(on=(topk_compression, gpipe), url="https://openreview.net/forum?id=UyPDg7ksTM", year=2025)
def beyond_topk(recipe: Part, *, keep: float = 0.1) -> Part:
    return recipe.wrap("block", Cut, keep=keep)


@claim
def what_is_lost_is_the_norm_of_what_was_dropped():
    """The Frobenius error is the norm of the dropped columns, and no other choice of as many has a smaller one."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 11, dtype=torch.float64) * torch.rand(11, dtype=torch.float64)
    kept = largest_columns(x, 4 / 11)
    error = (x - x * kept).norm()
    torch.testing.assert_close(error, x[..., ~kept].norm(), rtol=1e-12, atol=0)
    for choice in torch.combinations(torch.arange(11), 4):
        other = torch.zeros(11, dtype=torch.bool).index_fill_(0, choice, True)
        assert (x - x * other).norm() >= error - 1e-12


@claim
def the_gradient_comes_back_in_the_same_columns():
    """Backward through a cut, the gradient is zero in the dropped columns and whole in the kept ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    cut = Cut(12, inner=part(_Plain), keep=0.25).double()
    weight = torch.randn(2, 5, 12, dtype=torch.float64)
    (cut(x, Context()) * weight).sum().backward()
    kept = largest_columns(x, 0.25)
    assert kept.sum() == 3 and not x.grad[..., ~kept].any()
    torch.testing.assert_close(x.grad[..., kept], weight[..., kept], rtol=1e-12, atol=0)


@claim
def all_columns_are_the_pipeline_without():
    """With keep = 1 the logits of the model are those without cuts, to the bit."""
    torch.manual_seed(0)
    tiny = gpt.put("model.dim", 12).put("model.stack.depth", 2)
    facts, tokens = {"vocab": 11, "context": 9}, torch.randint(11, (2, 9))
    plain, cut = tiny().build(facts), (tiny + beyond_topk(keep=1.0))().build(facts)
    cut.load_state_dict({_inside(k): v for k, v in plain.state_dict().items()})
    assert torch.equal(plain(tokens), cut(tokens))


@claim
def entries_of_the_same_bytes_are_half_as_many():
    """A tenth of 120 columns over 50 positions takes 2,415 bytes; entries with their places, 8 bytes each, are 300."""
    x = torch.randn(2, 25, 120)
    assert cut_bytes(50, 120, 0.1) == 50 * 12 * 4 + 15
    assert largest_columns(x, 0.1).sum() == 12 and largest_entries(x, 0.1).sum() == 300


@claim.measured(paper="up to 90 % compression over 80 Mbps links, where entries of the same bytes fail (abstract)")
def better_than_entries(lab):
    """At 90 % compression before each of 4 blocks, columns end at least 0.02 bits per byte below entries of as many
    bytes.
    """
    cut = lab.recipe("gpt(dim=48, depth=4)+beyond-topk").put("loop.batch", 8)
    arms = {
        "columns": cut,
        "entries": cut.fill("choose", largest_entries),
        "random columns": cut.fill("choose", random_columns),
    }
    ends = {name: [lab.train(arm, seed=s, steps=500).score for s in lab.seeds(3)] for name, arm in arms.items()}
    gaps = [a - b for a, b in zip(ends["entries"], ends["columns"], strict=True)]
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers=ends)


class _Plain(nn.Module):
    """Passes on what it is given."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x


def _marked(sizes: Tensor, count: int) -> Tensor:
    """True at the `count` largest. (N,) -> (N,)."""
    return torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, sizes.topk(count).indices, True)


def _inside(name: str) -> str:
    start, found, rest = name.partition("stack.blocks.")
    block, _, rest = rest.partition(".")
    return f"{start}{found}{block}.inner.{rest}" if found else name
