"""FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving.
Ye, Chen, Lai, Lin, Zhang, Wang, Chen, Kasikci, Grover, Krishnamurthy, Ceze, 2025. arXiv:2501.01005

FlexAttention, but keys and values lie in pages anywhere in memory, pages that requests share are read once for all of
them, and a plan made before cuts long requests so that no worker waits for another.

A server holds many requests of unlike lengths, which grow, end, and often begin alike. Which queries see which pages is
a block-sparse matrix, whatever the cache looks like. Its blocks may be read by anyone in any order: what a query has
seen of one is an output and a log-sum, and two such states merge into that of both. A plan counts keys, as they are
what decoding waits for, and merging is left out of its cost. In the paper a template is compiled for score and mask,
and kernels run a plan on a GPU; here it is run block by block.
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
from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_2
from deltax.papers.systems.attention_kernels.flex_attention import flex
from deltax.papers.systems.attention_kernels.memory_efficient_attention import attend_tile, finish
from deltax.papers.systems.attention_kernels.online_softmax import log_sum, relative
from deltax.parts.attention.pages import Pages
from deltax.parts.attention.scores import Rules, causal
from deltax.parts.attention.tiles import over_heads
from deltax.shapes import Keys, Queries, Values


class State(NamedTuple):
    """What queries make of some keys: their output (B, T, H, W), and the log-sum of their scores (B, H, T)."""

    out: Tensor
    log: Tensor


def look(q: Queries, k: Keys, v: Values, rules: Rules) -> State:
    """The state of these queries once they have seen these keys, in float32 at least."""
    tile = attend_tile(q, k, v, rules)
    return State(finish(tile), log_sum(tile.seen))


def merge(a: State, b: State) -> State:
    """The state of the same queries once they have seen the keys of both (section 2.2)."""
    log = torch.logaddexp(a.log, b.log)
    return State(a.out * over_heads(relative(a.log, log)) + b.out * over_heads(relative(b.log, log)), log)


class Chunk(NamedTuple):
    """Keys `start` to `stop` of requests that have them in the same pages: a block of the matrix, read once for all."""

    requests: tuple[int, ...]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def alone(cache: Pages, requests: Iterable[int]) -> list[Chunk]:
    """Every request reads all its keys."""
    return [Chunk((r,), 0, cache.length(r)) for r in requests]


def shared(cache: Pages, requests: Iterable[int]) -> list[Chunk]:
    """Requests that begin with the same pages read these together, and go apart where pages do (section 3.1.2)."""
    chunks: list[Chunk] = []
    groups = [(list(requests), 0)]
    while groups:
        group, start = groups.pop()
        by_page: dict[int, list[int]] = {}
        for r in group:
            if cache.length(r) > start:
                by_page.setdefault(cache.tables[r][start // cache.size], []).append(r)
        for members in by_page.values():
            alike = (len(set(pages)) == 1 for pages in zip(*(cache.tables[r][start // cache.size :] for r in members)))
            count = next((i for i, same in enumerate(alike) if not same), math.inf)
            stop = min(start + count * cache.size, *map(cache.length, members), math.inf)
            chunks.append(Chunk(tuple(members), start, int(stop)))
            groups.append((members, int(stop)))
    return chunks


def plan(chunks: Sequence[Chunk], workers: int, *, page: int = 1) -> list[list[Chunk]]:
    """What each worker reads: nothing longer than a worker's share, rounded up to whole pages, the longest dealt first,
    each to whoever has least (Algorithm 1). Raises UserError for fewer than 1 worker.
    """
    if workers < 1:
        raise UserError(f"somebody must read the keys: give at least 1 worker, not {workers}")
    most = page * max(1, math.ceil(sum(c.length for c in chunks) / workers / page))
    pieces = [c._replace(start=s, stop=min(s + most, c.stop)) for c in chunks for s in range(c.start, c.stop, most)]
    return deal(sorted(pieces, key=lambda c: -c.length), workers)


def deal(chunks: Iterable[Chunk], workers: int) -> list[list[Chunk]]:
    """In this order, each chunk to the worker that has the fewest keys to read."""
    work: list[list[Chunk]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for chunk in chunks:
        load, worker = heapq.heappop(loads)
        work[worker].append(chunk)
        heapq.heappush(loads, (load + chunk.length, worker))
    return work


def longest(work: Iterable[Iterable[Chunk]]) -> int:
    """The keys that the busiest worker reads: the others wait for it."""
    return max(sum(c.length for c in chunks) for chunks in work)


@paper(on=(flex, flash_2), arxiv="2501.01005", year=2025)
def flashinfer(
    q: Float[Tensor, "N H K"],
    asked: Sequence[int],
    cache: Pages,
    requests: Sequence[int],
    work: Iterable[Iterable[Chunk]] | None = None,
    rules: Rules | None = None,
) -> Float[Tensor, "N H W"]:
    """Attention of a ragged batch: asked[i] queries of request i, one request after the other, over all its keys.

    The queries stand at the last positions that their request has written. `work` is a plan; without one every request
    is read whole. `rules` are a score and a mask, causal by default, asked of example i. A request that has written
    nothing has no queries; a query that sees no key gets zeros. Raises UserError for numbers that do not fit, for a
    plan that does not read every key of every request once, and for rules with positions or segments.
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
    count = dict(zip(requests, asked))
    own = dict(zip(requests, q.split(list(asked))))
    states: dict[int, State] = {}
    for chunk in chunks:
        sizes = [count[r] for r in chunk.requests]
        k, v = (x[None] for x in cache.read(chunk.requests[0], chunk.start, chunk.stop))
        at = torch.cat([torch.arange(cache.length(r) - count[r], cache.length(r)) for r in chunk.requests])
        who = torch.tensor([requests.index(r) for r in chunk.requests]).repeat_interleave(torch.tensor(sizes))
        placed = replace(
            _of(who.to(q.device), rules),
            q_at=at.to(q.device),
            k_at=torch.arange(chunk.start, chunk.stop, device=q.device),
        )
        new = look(torch.cat([own[r] for r in chunk.requests])[None], k, v, placed)
        for r, *found in zip(chunk.requests, new.out.split(sizes, 1), new.log.split(sizes, -1)):
            states[r] = merge(states[r], State(*found)) if r in states else State(*found)
    if not states:
        return torch.cat([q.new_zeros(0, q.shape[1], cache.read(r)[1].shape[-1]) for r in requests])
    return torch.cat([states[r].out[0] for r in requests if r in states]).to(q.dtype)


_PLACES = ("q_at", "k_at", "q_segments", "k_segments")


def _of(who: Tensor, rules: Rules) -> Rules:
    """The rules where each query (T,) is of an example of its own."""
    b = who[:, None]
    score = lambda scores, _, *at: rules.score(scores, b, *at)
    return Rules(score, lambda _, *at: rules.mask(b, *at))


def _check(q: Tensor, asked: Sequence[int], cache: Pages, requests: Sequence[int], chunks: Iterable[Chunk]) -> None:
    if len(asked) != len(requests) or sum(asked) != len(q):
        raise UserError(
            f"{len(q)} queries are not {list(asked)} of the requests {list(requests)}: say how many of each"
        )
    if not requests or len(set(requests)) < len(requests):
        raise UserError(f"give at least one request, and each once, not {list(requests)}")
    reads = Counter(r for c in chunks for r in c.requests for _ in range(c.start, c.stop))
    for r, count in zip(requests, asked):
        if not 0 <= count <= cache.length(r):
            raise UserError(f"{count} queries cannot stand at the last of request {r}'s {cache.length(r)} positions")
        if reads[r] != cache.length(r):
            raise UserError(
                f"the plan reads {reads[r]} of request {r}'s {cache.length(r)} keys: plan again once a cache grew"
            )
    if unknown := reads.keys() - set(requests):
        raise UserError(
            f"the plan reads keys of requests {sorted(unknown)}, and nobody asks for them: plan without them"
        )
