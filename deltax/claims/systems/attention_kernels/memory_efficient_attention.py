"""Claims of memory-efficient-attention: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import claim, part
from deltax.claims.agreement import is_attention
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.memory_efficient_attention import (
    attend_tile,
    finish,
    memory_efficient_attention,
    merge,
)
from deltax.parts.attention.scores import Rules, causal
from deltax.parts.attention.tiles import tiles


@claim
def it_is_attention():
    """For every rule and for chunks of 2 and 7 queries, output and gradients equal attention's."""
    is_attention(lambda size: part(memory_efficient_attention, queries=size, keys=4 * size), attend, (2, 7))


@claim
def tiles_merge_in_any_order():
    """Over 5 random merge trees of 9 shuffled tiles of keys, causal, the output equals attention's to 1e-13."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 61, 4, 5, dtype=torch.float64)
    rules = Rules(mask=part(causal))
    for _ in range(5):
        left = [attend_tile(q, k[:, c], v[:, c], rules, columns=c) for c in tiles(61, 7)]
        left = [left[i] for i in torch.randperm(len(left))]
        while len(left) > 1:
            i = int(torch.randint(len(left) - 1, ()))
            left[i : i + 2] = [merge(left[i], left[i + 1])]
        torch.testing.assert_close(finish(left[0]), attend(q, k, v, rules), rtol=1e-13, atol=1e-14)


@claim
def one_chunk_is_attention():
    """One chunk over all 61 queries and keys equals the unmerged tile to the bit and attention to 1e-15."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 61, 4, 5, dtype=torch.float64)
    rules = Rules(mask=part(causal))
    whole = finish(attend_tile(q, k, v, rules))
    assert torch.equal(whole, memory_efficient_attention(q, k, v, rules, queries=61, keys=61))
    torch.testing.assert_close(whole, attend(q, k, v, rules), rtol=0, atol=1e-15)


@claim
def only_the_arguments_are_kept():
    """At lengths 128 and 256 with chunks of 4, 32 and 128 keys, the bytes saved for backward are those of q, k and
    v.
    """
    for length in (128, 256):
        q, k, v = (torch.randn(1, length, 1, 4, requires_grad=True) for _ in range(3))
        arguments = 3 * q.numel() * q.element_size()
        for keys in (4, 32, 128):
            kernel = part(memory_efficient_attention, queries=16, keys=keys)
            assert kept_bytes(lambda: kernel(q, k, v, Rules(mask=part(causal)))) == arguments  # noqa: B023


def kept_bytes(call: object) -> int:
    """Bytes of the storages that a call saves for its backward pass, each counted once."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()  # kept alive, so that no storage address is reused
    del out
    return sum(storages.values())


@claim.measured(paper="at 16,384 positions 59 times less memory for inference, 32 times for differentiation (abstract)")
def memory_at_length(lab):
    """At 4096 positions, forward and backward take at most an eighth of plain attention's peak memory."""
    peak = lambda name: lab.peak_memory(_forward_and_backward, name, 4096, warm=(name, 64))
    bytes_ = {name: [peak(name) for _ in range(3)] for name in ("attend", "memory_efficient_attention")}
    ratios = [a / b for a, b in zip(*bytes_.values(), strict=True)]
    return lab.at_least(ratios, 8, unit="times less", numbers={"bytes": bytes_})


def _forward_and_backward(name: str, time: int) -> None:
    kernels = {"attend": attend, "memory_efficient_attention": part(memory_efficient_attention, queries=256, keys=1024)}
    q, k, v = (torch.randn(1, time, 1, 16, requires_grad=True) for _ in range(3))
    kernels[name](q, k, v, Rules(mask=part(causal))).sum().backward()
