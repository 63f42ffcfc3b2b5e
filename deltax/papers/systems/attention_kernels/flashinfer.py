"""FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving.
Ye, Chen, Lai, Lin, Zhang, Wang, Chen, Kasikci, Grover, Krishnamurthy, Ceze, 2025. arXiv:2501.01005

FlexAttention, but keys and values lie in shared pages, and a plan balances the reads of ragged requests over workers.

A server holds requests of different lengths, which grow, end, and often share a prefix. Queries x pages is then a
block-sparse matrix. Its blocks can be read by any worker in any order: each gives an output and a log-sum-exp, and two
such states merge. A plan counts keys, since decoding is bound by reading them, and leaves out the cost of merging. The
paper compiles a template for score and mask and runs plans on a GPU; here a plan is run block by block.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deltax import paper, part
from deltax.errors import UserError
from deltax.papers.systems.attention_kernels.flash_attention import flash
from deltax.papers.systems.attention_kernels.flex_attention import flex
from deltax.papers.systems.attention_kernels.memory_efficient_attention import attend_tile, finish
from deltax.papers.systems.attention_kernels.online_softmax import log_sum, relative
from deltax.parts.attention.pages import Pages
from deltax.parts.attention.scores import Rules, causal
from deltax.parts.attention.tiles import over_heads
from deltax.shapes import Keys, Queries, Values


class State(NamedTuple):
    """Attention to some keys: output (B, T, H, W), and log-sum-exp of the scores (B, H, T)."""

    out: Tensor
    log: Tensor


class Chunk(NamedTuple):
    """Keys `start` to `stop`, in the same pages for all these requests: one block of the matrix, read once."""

    requests: tuple[int, ...]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@paper(on=(flash, flex), arxiv="2501.01005", year=2025)
def flashinfer(
    q: Float[Tensor, "N H K"],
    asked: Sequence[int],
    cache: Pages,
    requests: Sequence[int],
    work: Iterable[Iterable[Chunk]] | None = None,
    rules: Rules | None = None,
) -> Float[Tensor, "N H W"]:
    """Attention of a ragged batch: asked[i] queries of request i, request after request, over all its keys.

    The queries are at the last positions of their request. `work` is a plan; by default every request is read whole.
    `rules` are a score and a mask, causal by default, called with example index i. Raises UserError for counts that do
    not match, for a plan that does not read every key of every request once, and for rules with positions or segments.
    """
    work = work if work is not None else [alone(cache, requests)]
    rules = rules or Rules(mask=part(causal))
    if given := [name for name in _PLACES if getattr(rules, name) is not None]:
        raise UserError(
            f"{given[0]} of rules have no place in a ragged batch: queries stand at the end of their request, and a "
            "request is one segment; write who sees whom as a mask(b, h, q, k)"
        )
    chunks = [chunk for chunk in chain.from_iterable(work) if chunk.length]
    _check(q, asked, cache, requests, chunks)
    count = dict(zip(requests, asked))  # queries of each request
    own = dict(zip(requests, q.split(list(asked))))  # (N, H, K) -> (n_r, H, K) a request
    states: dict[int, State] = {}
    for chunk in chunks:
        sizes = [count[r] for r in chunk.requests]
        # pages shared by these requests are read once: (1, S, G, K)
        k, v = (x[None] for x in cache.read(chunk.requests[0], chunk.start, chunk.stop))
        # queries of all sharing requests in one tile, at the last positions of each
        at = torch.cat([torch.arange(cache.length(r) - count[r], cache.length(r)) for r in chunk.requests])
        who = torch.tensor([requests.index(r) for r in chunk.requests]).repeat_interleave(torch.tensor(sizes))
        placed = replace(
            _of(who.to(q.device), rules),
            q_at=at.to(q.device),
            k_at=torch.arange(chunk.start, chunk.stop, device=q.device),
        )
        new = look(torch.cat([own[r] for r in chunk.requests])[None], k, v, placed)
        # split the tile's state by request, and merge it into each request's
        for r, *found in zip(chunk.requests, new.out.split(sizes, 1), new.log.split(sizes, -1)):
            states[r] = merge(states[r], State(*found)) if r in states else State(*found)
    if not states:
        return torch.cat([q.new_zeros(0, q.shape[1], cache.read(r)[1].shape[-1]) for r in requests])
    return torch.cat([states[r].out[0] for r in requests if r in states]).to(q.dtype)


def look(q: Queries, k: Keys, v: Values, rules: Rules) -> State:
    """The state of these queries over these keys, in float32 at least."""
    tile = attend_tile(q, k, v, rules)  # undivided output, m and l
    return State(finish(tile), log_sum(tile.seen))


def merge(a: State, b: State) -> State:
    """The state over the union of two sets of keys (section 2.2)."""
    # l = log(e^l1 + e^l2), o = o1 e^(l1 - l) + o2 e^(l2 - l)
    log = torch.logaddexp(a.log, b.log)
    return State(a.out * over_heads(relative(a.log, log)) + b.out * over_heads(relative(b.log, log)), log)


def plan(chunks: Sequence[Chunk], workers: int, *, page: int = 1) -> list[list[Chunk]]:
    """The chunks that each worker reads (Algorithm 1), longest first to the least loaded worker.

    A chunk is cut to a worker's share, in whole pages. Raises UserError for fewer than 1 worker.
    """
    if workers < 1:
        raise UserError(f"a plan needs at least 1 worker, not {workers}: choose 1 or more")
    # at most total / workers keys a piece, rounded up to whole pages
    most = page * max(1, math.ceil(sum(c.length for c in chunks) / workers / page))
    pieces = [c._replace(start=s, stop=min(s + most, c.stop)) for c in chunks for s in range(c.start, c.stop, most)]
    # longest processing time first
    return deal(sorted(pieces, key=lambda c: -c.length), workers)


def deal(chunks: Iterable[Chunk], workers: int) -> list[list[Chunk]]:
    """Assigns each chunk, in this order, to the worker with the fewest keys."""
    work: list[list[Chunk]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for chunk in chunks:
        load, worker = heapq.heappop(loads)
        work[worker].append(chunk)
        heapq.heappush(loads, (load + chunk.length, worker))
    return work


def shared(cache: Pages, requests: Iterable[int]) -> list[Chunk]:
    """Requests with the same leading pages read them together, and separately from where they differ (section
    3.1.2).
    """
    chunks: list[Chunk] = []
    groups = [(list(requests), 0)]
    while groups:
        group, start = groups.pop()
        by_page: dict[int, list[int]] = {}
        for r in group:
            if cache.length(r) > start:
                by_page.setdefault(cache.tables[r][start // cache.size], []).append(r)
        for members in by_page.values():
            # how many further pages all members share
            alike = (len(set(pages)) == 1 for pages in zip(*(cache.tables[r][start // cache.size :] for r in members)))
            count = next((i for i, same in enumerate(alike) if not same), math.inf)
            stop = min(start + count * cache.size, *map(cache.length, members), math.inf)
            chunks.append(Chunk(tuple(members), start, int(stop)))
            groups.append((members, int(stop)))
    return chunks


def alone(cache: Pages, requests: Iterable[int]) -> list[Chunk]:
    """One chunk a request: each request reads all its keys."""
    return [Chunk((r,), 0, cache.length(r)) for r in requests]


def longest(work: Iterable[Iterable[Chunk]]) -> int:
    """The number of keys that the busiest worker reads."""
    return max(sum(c.length for c in chunks) for chunks in work)


_PLACES = ("q_at", "k_at", "q_segments", "k_segments")


def _of(who: Tensor, rules: Rules) -> Rules:
    """The rules with an example index for each query (T,)."""
    b = who[:, None]
    score = lambda scores, _, *at: rules.score(scores, b, *at)
    return Rules(score, lambda _, *at: rules.mask(b, *at))


def _check(q: Tensor, asked: Sequence[int], cache: Pages, requests: Sequence[int], chunks: Iterable[Chunk]) -> None:
    if len(asked) != len(requests) or sum(asked) != len(q):
        raise UserError(
            f"{len(q)} queries do not match counts {list(asked)} of requests {list(requests)}: give one count a request"
        )
    if not requests or len(set(requests)) < len(requests):
        raise UserError(f"requests must be distinct and at least one, not {list(requests)}: give each once")
    reads = Counter(r for c in chunks for r in c.requests for _ in range(c.start, c.stop))
    for r, count in zip(requests, asked):
        if not 0 <= count <= cache.length(r):
            raise UserError(
                f"request {r} has {cache.length(r)} positions and {count} queries: give 0 to {cache.length(r)} queries"
            )
        if reads[r] != cache.length(r):
            raise UserError(
                f"the plan reads {reads[r]} keys of request {r}, and the cache has {cache.length(r)}: plan again"
            )
    if unknown := reads.keys() - set(requests):
        raise UserError(
            f"the plan reads requests {sorted(unknown)}, which have no queries in this batch: plan without them"
        )
