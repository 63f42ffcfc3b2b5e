"""Claims of megatron: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from deltax import Part, claim
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.parallelism.megatron import _shard, cross_entropy, megatron
from deltax.parts.attention.context import Context
from deltax.parts.distributed.ranks import Ranks


@claim
def cut_it_computes_what_it_did_whole():
    """On 1, 2 and 4 ranks, logits and all gradients equal the uncut model's to 1e-10."""
    for ranks in (1, 2, 4):
        ours, theirs = _random(gpt + megatron(ranks=ranks)), _random(gpt)
        theirs.load_state_dict({k.replace(".inner.", "."): v for k, v in ours.state_dict().items()})
        tokens, weight = torch.randint(0, 11, (2, 7)), torch.randn(2, 7, 11, dtype=torch.float64)
        for model in (ours, theirs):
            (model(tokens) * weight).sum().backward()
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-10, atol=1e-12)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@claim
def a_block_sums_four_times():
    """On 2 and 4 ranks, a block does two all-reduces forward and two backward (Figure 4); a rank sends 8 (P - 1) / P of
    B T D.
    """
    for ranks in (2, 4):
        block = _random(gpt + megatron(ranks=ranks)).stack.blocks[0]
        x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
        rings = block.mixer.ring, block.mlp.ring
        y = block(x, Context())
        assert [ring.calls["all_reduce"] for ring in rings] == [1, 1]
        y.sum().backward()
        assert [ring.calls["all_reduce"] for ring in rings] == [2, 2]
        assert rings[0].sent[0] + rings[1].sent[0] == 8 * (ranks - 1) * x.numel() // ranks


@claim
def the_loss_needs_no_logits_of_others():
    """On 2 and 4 ranks, vocabulary-parallel cross-entropy and gradient equal torch's to 1e-12, with two all-reduces of
    one number a token.
    """
    torch.manual_seed(0)
    for ranks in (2, 4):
        logits = (30 * torch.randn(5, 12, dtype=torch.float64)).requires_grad_()
        targets, weight, ring = torch.randint(0, 12, (5,)), torch.randn(5, dtype=torch.float64), Ranks(ranks)
        ours = cross_entropy(list(logits.chunk(ranks, -1)), targets, ring)
        theirs = nn.functional.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad((loss * weight).sum(), logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        assert ring.calls["all_reduce"] == 2
        assert ring.sent[0] < 3 * len(targets) * 2


@claim
def a_bias_after_rows_is_added_once():
    """With the last map's bias added on both of two ranks, the branch is off by exactly that bias."""
    block = _random(gpt + megatron(ranks=2)).stack.blocks[0]
    mlp, x = block.mlp, torch.randn(1, 3, 12, dtype=torch.float64)
    own = [{n: _shard(n, p, rank, 2) for n, p in mlp.inner.named_parameters()} for rank in range(2)]
    parts = lambda: sum(functional_call(branch, shard, (x,)) for branch, shard in zip(mlp._ranks, own))
    torch.testing.assert_close(parts(), mlp.inner(x), rtol=1e-12, atol=1e-12)
    own[1]["down.bias"] = mlp.inner.down.bias
    torch.testing.assert_close(parts(), mlp.inner(x) + mlp.inner.down.bias, rtol=1e-12, atol=1e-12)


def _random(recipe: Part) -> Any:
    """A small model of the recipe in float64, every parameter drawn."""
    torch.manual_seed(0)
    for path, value in (("model.dim", 12), ("model.stack.depth", 1)):
        recipe = recipe.put(path, value)
    heads = "model.stack.block.mixer.inner.heads" if "Split" in repr(recipe) else "model.stack.block.mixer.heads"
    model = recipe.put(heads, 4)().build({"vocab": 11, "context": 9}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model
