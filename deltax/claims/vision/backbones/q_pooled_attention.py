"""Claims of q-pooled-attention: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim, part
from deltax.claims.checking import faster, randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.backbones.q_pooled_attention import QPooled, q_pooled_attention, z_order
from deltax.papers.vision.backbones.vit import vit
from deltax.parts.attention.context import Context


@claim
def pooling_by_one_is_attention():
    """With a stride of 1 and no widening it is Attention, to the bit."""
    plain = randomise(Attention(12, heads=3))
    pooled = Attention(12, heads=3, project=part(QPooled, stride=1)).double()
    pooled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.equal(pooled(x, Context()), plain(x, Context()))


@claim
def a_group_asks_as_one():
    """N elements come out as N / s; permuting the elements inside groups leaves every output as it was, and across
    groups does not."""
    attention = randomise(Attention(12, heads=3, project=part(QPooled, stride=3, widen=2)))
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    out = attention(x, Context())
    assert out.shape == (2, 5, 24)
    inside = torch.cat([3 * group + torch.randperm(3) for group in range(5)])
    torch.testing.assert_close(attention(x[:, inside], Context()), out)
    assert not torch.allclose(attention(x[:, torch.arange(15).roll(1)], Context()), out)


@claim
def scores_cost_a_stride_less():
    """The two products of attention over N elements take N^2 / s times as many FLOPs as for one pair."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(stride: int, count: int) -> int:
        attention = Attention(8, heads=2, project=part(QPooled, stride=stride))
        with FlopCounterMode(display=False) as counter:
            attention.kernel(*attention.project.split(torch.randn(1, count, 8)))
        return counter.get_total_flops() - 3 * 2 * count * 8 * 8

    assert all(flops(stride, count) == 2 * 2 * 8 * count**2 // stride for stride in (1, 4) for count in (16, 64))


@claim
def z_order_keeps_squares_together():
    """It is a permutation, in which each run of 4^n patches, from any multiple of it on, is a square of side 2^n; units
    go row by row."""
    rows, columns, levels = 8, 12, 2
    order = torch.tensor(z_order((rows, columns), levels))
    assert torch.equal(order.sort().values, torch.arange(rows * columns))
    for n in range(levels + 1):
        runs = order.view(-1, 4**n)
        for at in (runs // columns, runs % columns):
            assert ((at.amax(1) - at.amin(1)) == 2**n - 1).all()
    corners = order[:: 4**levels]
    assert torch.equal(corners, corners.sort().values)


@claim.parity(peer="transformers HieraMaskUnitAttention")
def equals_transformers():
    """The same random weights give the outputs and gradients of transformers' pooling attention, which keeps groups a
    stride apart, over all elements."""
    from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention

    theirs = randomise(HieraMaskUnitAttention(6, 12, num_heads=2, query_stride=4))
    ours = Attention(6, heads=2, project=part(QPooled, stride=4, widen=2)).double()
    names = ("query", "key", "value")
    thirds = {f"project.{n}.{k}": v for k, t in theirs.qkv.state_dict().items() for n, v in zip(names, t.chunk(3))}
    ours.load_state_dict(thirds | {f"project.out.{k}": v for k, v in theirs.proj.state_dict().items()})
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    apart = other.unflatten(1, (5, 4)).transpose(1, 2).flatten(1, 2)
    same_gradients(ours(x, Context()), theirs(apart)[0])
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(ours.project.query.weight.grad, theirs.qkv.weight.grad[:12])


@claim
def a_stream_gets_shorter_and_wider():
    """Over a ViT, each stage after the first has a quarter of the elements and twice the width of the one before."""
    recipe = paper_of(vit)(dim=24, heads=4, patch=1) + q_pooled_attention(depths=(1, 2, 1))
    trunk = recipe["model.trunk"](2, (8, 12))
    x = trunk.tokens(torch.randn(1, 2, 8, 12))
    assert [tuple(y.shape) for y in trunk.stack.each(x, Context())] == [(1, 96, 6), (1, 24, 12), (1, 6, 24)]


@claim.measured(paper="outperforms vision transformers that are 5 to 10 times more costly in computation (abstract)")
def pooled_queries_cost_less(lab):
    """The reference attention over 1024 elements, forward and backward, takes at least twice as long as with queries
    pooled by four."""
    x, ctx = torch.randn(2, 1024, 64), Context()
    modules = [
        Attention(64, heads=4, project=part(QPooled, stride=4)),
        Attention(64, heads=4),
    ]
    found = lab.ratio(*(lambda module=module: module(x, ctx).sum().backward() for module in modules))
    return lab.verdict(faster(found, 2.0), estimate=found.value, interval=found, unit="times the time")
