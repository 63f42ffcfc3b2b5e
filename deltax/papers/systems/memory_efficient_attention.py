"""Self-attention Does Not Need O(n^2) Memory. Rabe, Staats, 2021. arXiv:2112.05682

An online softmax, but each block of scores is summed with its values at once and forgotten, to be made again by
activation checkpointing.

Softmax divides by a sum over all keys; the division can wait. So a chunk of keys is summarised for a chunk of queries
as its largest score, its sum of exponentials and its weighted values, and summaries merge as in online softmax with the
values riding along. The paper checkpoints the summary of a chunk of keys, which leaves the summaries themselves to be
kept; here the chunk of queries that they belong to is checkpointed too.
"""

from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltax import Part, claim, paper, part
from deltax.papers.language.softmax_attention import attend, softmax_attention
from deltax.papers.systems import online_softmax
from deltax.papers.systems.activation_checkpointing import activation_checkpointing, checkpoint
from deltax.papers.systems.online_softmax import Seen, look, relative, softmax
from deltax.parts.agreement import is_attention
from deltax.parts.scores import Rules, causal
from deltax.parts.tiles import as_autocast, over_heads, spread, tile_scores, tiles
from deltax.shapes import Heads, Keys, Queries, Values


class Tile(NamedTuple):
    """What some queries have seen of some keys: `seen` (B, H, T), and the values gathered (B, T, H, K), undivided."""

    seen: Seen
    out: Tensor


def attend_tile(
    q: Queries, k: Keys, v: Values, rules: Rules, rows: slice = slice(None), columns: slice = slice(None)
) -> Tile:
    """One tile of queries (B, T, H, K), keys and values (B, S, G, K); rows and columns say where it lies in the whole.

    Statistics and output are in float32 at least.
    """
    scores = tile_scores(q, k, rules, rows, columns)
    seen = look(scores)
    return Tile(seen, gather(relative(scores, seen.max[..., None]), v))


def gather(weights: Tensor, v: Values) -> Heads:
    """Values (B, S, G, K) summed with weights (B, H, T, S), in the precision of the weights. -> (B, T, H, K)."""
    return torch.einsum("bhts,bshk->bthk", weights.to(v.dtype), spread(v, weights.shape[1])).to(weights.dtype)


def merge(a: Tile, b: Tile) -> Tile:
    """The pairs merge as in online softmax, and each output is scaled to the larger maximum (section 2)."""
    seen = online_softmax.merge(a.seen, b.seen)
    rescale = lambda tile: tile.out * over_heads(relative(tile.seen.max, seen.max))
    return Tile(seen, rescale(a) + rescale(b))


def finish(tile: Tile) -> Heads:
    """The one division, done last. A query that has seen nothing gets zeros. -> (B, T, H, K)."""
    total = over_heads(tile.seen.sum)
    return tile.out / total.masked_fill(total == 0, 1.0)


def memory_efficient_attention(
    q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, queries: int = 16, keys: int = 64
) -> Heads:
    """`attend`, a chunk of queries and keys at a time: keeps nothing but its arguments for the backward pass.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). The paper's chunks are of 1024
    queries and 4096 keys. Gradients reach q, k, v and the parameters of a score that is a module. Raises UserError for
    a chunk below 1.
    """
    rules = rules or Rules()
    q, k, v = as_autocast(q, k, v)
    if not (q.shape[1] and k.shape[1]):
        return attend(q, k, v, rules)  # there is no chunk
    learned = rules.learned.values()
    chunks = [checkpoint(partial(_rows, rules, r, keys), q[:, r], k, v, *learned) for r in tiles(q.shape[1], queries)]
    return torch.cat(chunks, 1).to(q.dtype)


memory_efficient_attention.reference = attend  # the same function of its arguments: what FLOPs are counted on


def _rows(rules: Rules, rows: slice, keys: int, q: Queries, k: Keys, v: Values, *learned: Tensor) -> Heads:
    """A chunk of queries and all keys."""
    summaries = (
        checkpoint(partial(_summary, rules, rows, columns), q, k[:, columns], v[:, columns], *learned)
        for columns in tiles(k.shape[1], keys)
    )
    return finish(reduce(merge, (Tile(Seen(largest, total), out) for largest, total, out in summaries)))


def _summary(rules: Rules, rows: slice, columns: slice, q: Queries, k: Keys, v: Values, *learned: Tensor) -> tuple:
    tile = attend_tile(q, k, v, rules.holding(learned), rows, columns)
    return *tile.seen, tile.out


@paper(on=(softmax, activation_checkpointing, softmax_attention), arxiv="2112.05682", year=2021)
def memory_efficient(recipe: Part, *, queries: int = 16, keys: int = 64) -> Part:
    tiles(0, min(queries, keys))  # refuses a chunk below 1 where it is written
    return recipe.fill("kernel", memory_efficient_attention, queries=queries, keys=keys)


@claim
def it_is_attention():
    """Whatever the chunks and whoever sees whom, output and gradients are those of attention, at any length."""
    is_attention(lambda size: part(memory_efficient_attention, queries=size, keys=4 * size), attend, (2, 7))


@claim
def tiles_merge_in_any_order():
    """Merging is associative and commutative, values and all: any tree over any order of the keys gives attention."""
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
    """A chunk that covers every query and key is attention, to rounding: nothing is merged."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 61, 4, 5, dtype=torch.float64)
    rules = Rules(mask=part(causal))
    whole = finish(attend_tile(q, k, v, rules))
    assert torch.equal(whole, memory_efficient_attention(q, k, v, rules, queries=61, keys=61))
    torch.testing.assert_close(whole, attend(q, k, v, rules), rtol=0, atol=1e-15)


@claim
def only_the_arguments_are_kept():
    """What is kept for the backward pass is queries, keys and values, whatever the number of chunks."""
    for length in (128, 256):
        q, k, v = (torch.randn(1, length, 1, 4, requires_grad=True) for _ in range(3))
        arguments = 3 * q.numel() * q.element_size()
        for keys in (4, 32, 128):
            kernel = part(memory_efficient_attention, queries=16, keys=keys)
            assert kept_bytes(lambda: kernel(q, k, v, Rules(mask=part(causal)))) == arguments  # noqa: B023


def kept_bytes(call: object) -> int:
    """Bytes of the storages that a call keeps for its backward pass, each once."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()  # alive until counted: no storage's place is taken by another
    del out
    return sum(storages.values())


@claim.measured(paper="at 16,384 positions 59 times less memory for inference, 32 times for differentiation (abstract)")
def memory_at_length(lab):
    """At 4096 positions, one forward and backward pass takes at most an eighth of attention's peak memory."""
    peak = lambda name: lab.peak_memory(_forward_and_backward, name, 4096, warm=(name, 64))
    bytes_ = {name: [peak(name) for _ in range(3)] for name in ("attend", "memory_efficient_attention")}
    ratios = [a / b for a, b in zip(*bytes_.values(), strict=True)]
    return lab.at_least(ratios, 8, unit="times less", numbers={"bytes": bytes_})


def _forward_and_backward(name: str, time: int) -> None:
    kernels = {"attend": attend, "memory_efficient_attention": part(memory_efficient_attention, queries=256, keys=1024)}
    q, k, v = (torch.randn(1, time, 1, 16, requires_grad=True) for _ in range(3))
    kernels[name](q, k, v, Rules(mask=part(causal))).sum().backward()
