"""Claims of beyond-topk: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.decentralized.beyond_topk import (
    Cut,
    beyond_topk,
    cut_bytes,
    largest_columns,
    largest_entries,
    random_columns,
)
from deltax.parts.attention.context import Context
from deltax.shapes import Stream


@claim
def what_is_lost_is_the_norm_of_what_was_dropped():
    """For 4 of 11 columns, the Frobenius error is the norm of the dropped ones, and no other 4 columns have a smaller
    error.
    """
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
    """Through a cut with keep = 0.25, the gradient is zero in dropped columns and unchanged in kept ones."""
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
    """With keep = 1, logits equal those of the model without cuts, to the bit."""
    torch.manual_seed(0)
    tiny = gpt.put("model.dim", 12).put("model.stack.depth", 2)
    facts, tokens = {"vocab": 11, "context": 9}, torch.randint(11, (2, 9))
    plain, cut = tiny().build(facts), (tiny + beyond_topk(keep=1.0))().build(facts)
    cut.load_state_dict({_inside(k): v for k, v in plain.state_dict().items()})
    assert torch.equal(plain(tokens), cut(tokens))


@claim
def entries_of_the_same_bytes_are_half_as_many():
    """At keep = 0.1 of 120 columns and 50 positions, columns cost 2415 bytes, and 300 entries of 8 bytes cost the
    same.
    """
    x = torch.randn(2, 25, 120)
    assert cut_bytes(50, 120, 0.1) == 50 * 12 * 4 + 15
    assert largest_columns(x, 0.1).sum() == 12 and largest_entries(x, 0.1).sum() == 300


@claim.measured(paper="up to 90 % compression over 80 Mbps links, where entries of the same bytes fail (abstract)")
def better_than_entries(lab):
    """At 90 % compression before each of 4 blocks, columns finish at least 0.02 bits/byte below entries of the same
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
    """Identity block."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x


def _inside(name: str) -> str:
    start, found, rest = name.partition("stack.blocks.")
    block, _, rest = rest.partition(".")
    return f"{start}{found}{block}.inner.{rest}" if found else name
