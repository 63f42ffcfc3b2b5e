"""Claims of flashinfer: the paper's equations, parity with peers, and what it measures."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from deltax import claim, part
from deltax.claims.checking import randomise
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels.flashinfer import (
    Chunk,
    alone,
    deal,
    flashinfer,
    longest,
    look,
    merge,
    plan,
    shared,
)
from deltax.papers.systems.attention_kernels.flex_attention import soft_cap
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.pages import PagedState, Pages
from deltax.parts.attention.scores import Rules, causal, window


@claim
def merging_is_attention_over_the_union():
    """Over 5 random splits of 61 keys, merged in random order, output and gradients equal attention's to 1e-12.
    Merging the state of no key changes no bit.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, t, h, 5, dtype=torch.float64, requires_grad=True) for t, h in ((7, 6), (61, 2), (61, 2)))
    weight, wanted = torch.randn_like(q), attend(q, k, v)
    expected = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for _ in range(5):
        cuts = [0, *sorted((1 + torch.randperm(60)[:6]).tolist()), 61]
        left = [look(q, k[:, a:b], v[:, a:b], Rules()) for a, b in pairwise(cuts)]
        while len(left) > 1:
            i, j = torch.randperm(len(left))[:2].tolist()
            left = [merge(left[i], left[j]), *(x for n, x in enumerate(left) if n not in (i, j))]
        found = torch.autograd.grad((left[0].out * weight).sum(), (q, k, v))
        for ours, theirs in zip((left[0].out, *found), (wanted, *expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    nothing = look(q, k, v, Rules(mask=lambda b, h, i, j: (i < 0) & (j < 0)))
    for both in (merge(left[0], nothing), merge(nothing, left[0])):
        assert torch.equal(both.out, left[0].out) and torch.equal(both.log, left[0].log)


@claim
def pages_change_no_bit():
    """Scattered pages and one contiguous page give the same bits; so does a gpt decoding with pages of 1, 4 and 32."""
    from deltax.papers.language.models.gpt import gpt

    q, scattered = drawn(size=8)
    together = Pages(len(ASKED), 64)
    for r in ASKED:
        together.append(r, *scattered.read(r))
    assert any(b - a != 1 for table in scattered.tables.values() for a, b in pairwise(table))
    assert all(len(table) == 1 for table in together.tables.values())
    assert torch.equal(*(flashinfer(q, [*ASKED.values()], cache, [*ASKED]) for cache in (scattered, together)))
    torch.manual_seed(0)
    model = randomise(gpt().build({"vocab": 11, "context": 19}), std=0.1)
    tokens = torch.randint(11, (2, 19))
    with torch.no_grad():
        for size in (1, 4, 32):
            states = DecodingState(), PagedState(2 * 19, size)
            steps = [[model(x, Context(state=s)) for x in tokens.split([5, 1, 1, 3, 9], 1)] for s in states]
            assert all(map(torch.equal, *steps))


@claim
def ragged_batches_are_attention():
    """For page sizes 1 to 64, with and without sharing, over 1, 3 and 50 workers and four rules, each request's output
    equals its own attention to 1e-12.
    """
    scores = (lambda s, b, h, q, k: s * (1 + b)), Distance(6), part(soft_cap, cap=2.0), Rules().score
    of_example = lambda b, h, q, k: (k <= q) & ((q + k + b) % 3 > 0)
    for size, score, mask in zip((1, 4, 8, 64), scores, (part(window, width=9), of_example, part(causal), of_example)):
        q, cache = drawn(size=size)
        rules = Rules(score, mask)
        wanted = []
        for i, (r, mine) in enumerate(zip(ASKED, q.split([*ASKED.values()]))):
            k, v = (x.expand(i + 1, -1, -1, -1) for x in cache.read(r))  # the last of i + 1 examples is example i
            at = torch.arange(cache.length(r) - ASKED[r], cache.length(r))
            wanted.append(attend(mine.expand(i + 1, -1, -1, -1), k, v, replace(rules, q_at=at))[-1])
        for chunks in (alone(cache, ASKED), shared(cache, ASKED)):
            for workers in (1, 3, 50):
                work = plan(chunks, workers, page=size)
                ours = flashinfer(q, [*ASKED.values()], cache, [*ASKED], work, rules)
                torch.testing.assert_close(ours, torch.cat(wanted), rtol=1e-12, atol=1e-12)


@claim
def what_is_shared_is_kept_and_read_once():
    """For a shared prompt of p keys and n continuations of s, p / size + n s / size pages are kept and p + n s keys
    read. Writing to a shared page copies it and leaves the other requests' bits.
    """
    torch.manual_seed(0)
    size, n, s = 8, 5, 16
    for p in (64, 61):
        cache = Pages(64, size)
        cache.append(0, *torch.randn(2, p, 2, 5))
        before = cache.read(0)
        for r in range(1, n):
            cache.fork(0, r)
        assert cache.taken == -(-p // size)
        for r in range(n):
            cache.append(r, *torch.randn(2, s, 2, 5))
        assert all(torch.equal(x, y) for r in range(n) for x, y in zip(cache.read(r, 0, p), before))
        whole, tail = divmod(p, size)
        assert cache.taken == whole + n * -(-(tail + s) // size)
        read = [sum(c.length for c in chunks) for chunks in (shared(cache, range(n)), alone(cache, range(n)))]
        assert read == [whole * size + n * (tail + s), n * (p + s)]
        for r in range(n):
            cache.close(r)
        assert cache.taken == 0


@claim
def a_plan_is_complete_and_balanced():
    """Over 30 random batches, each key is read exactly once, and the busiest worker reads less than two shares and a
    page.
    """
    torch.manual_seed(0)
    for trial in range(30):
        chunks = [Chunk((r,), 0, n) for r, n in enumerate((1 + torch.randn(20).mul(2).exp() * 50).long().tolist())]
        workers, page = 1 + trial, (1, 16)[trial % 2]
        work = plan(chunks, workers, page=page)
        share = sum(c.length for c in chunks) / workers
        assert share <= longest(work) < 2 * share + page
        pieces = sorted(c for own in work for c in own)
        for whole in chunks:
            ends = [(c.start, c.stop) for c in pieces if c.requests == whole.requests]
            starts, stops = zip(*ends, strict=True)
            assert (*starts, whole.stop) == (0, *stops) and all(a % page == 0 for a in starts)


@claim.parity(peer="torch.nn.attention.experimental._paged_attention.PagedAttention, on flex_attention")
def equals_torchs_pages():
    """For one query each of five requests of 1 to 61 keys with a window of 20, output equals torch's paged
    FlexAttention to 1e-12.
    """
    from unittest.mock import patch

    from torch.nn.attention import flex_attention as peer
    from torch.nn.attention.experimental._paged_attention import PagedAttention

    torch.manual_seed(0)
    lengths, size = (1, 13, 61, 24, 37), 8
    ours, theirs = Pages(30, size), PagedAttention(30, size, len(lengths), device="cpu")
    k_store, v_store = torch.zeros(2, 1, 2, 30 * size, 5, dtype=torch.float64)
    for r in torch.randperm(len(lengths)).tolist():
        k, v = torch.randn(2, lengths[r], 2, 5, dtype=torch.float64)
        ours.append(r, k, v)
        theirs.reserve(torch.tensor(r), torch.tensor(lengths[r]))
        heads_first = (x.transpose(0, 1)[None] for x in (k, v))
        theirs.assign(torch.tensor([r]), torch.arange(lengths[r])[None], *heads_first, k_store, v_store)
    q = torch.randn(len(lengths), 6, 5, dtype=torch.float64)
    last = torch.tensor(lengths)
    visible = lambda b, h, i, j: (last[b] - 1 - j < 20) & (j < last[b])
    logical = peer.create_block_mask(visible, len(lengths), None, 1, 64, device="cpu", BLOCK_SIZE=(1, size))
    blocks = theirs.convert_logical_block_mask(logical, kv_len=last)
    with patch.object(peer, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):  # eager, not traced
        wanted = peer.flex_attention(
            q[:, :, None],
            *(x.expand(len(lengths), -1, -1, -1) for x in (k_store, v_store)),
            score_mod=theirs.get_score_mod(None, kv_len=last),
            block_mask=blocks,
            enable_gqa=True,
        )[:, :, 0]
    work, rules = plan(alone(ours, range(5)), 4, page=size), Rules(mask=part(window, width=20))
    out = flashinfer(q, [1] * 5, ours, range(5), work, rules)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@claim.measured(paper="29 to 69 % less time between tokens than a server on Triton's kernels (abstract)")
def nobody_waits_for_the_longest(lab):
    """Simulated, 64 requests of Zipf lengths: the plan's busiest of 16 workers reads at least 29 % fewer keys than when
    whole requests are dealt.
    """
    saved = []
    for seed in lab.seeds(8):
        source = np.random.default_rng(seed)
        chunks = [Chunk((r,), 0, int(n)) for r, n in enumerate(np.minimum(256 * source.zipf(2.0, 64), 16_384))]
        saved.append(1 - longest(plan(chunks, 16, page=16)) / longest(deal(chunks, 16)))
    return lab.at_least(saved, 0.29, unit="of the keys that the busiest reads")


@claim.measured(paper="13 to 17 % less time between tokens where several continuations are decoded (abstract)")
def a_prompt_read_once_saves_time(lab):
    """For 16 continuations of a prompt of 4096 keys, decoding a token takes at least 13 % less time when the prompt is
    read once for all than once each.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(2, n, 8, 64, generator=generator)
    cache, requests = Pages(512, 16), range(16)
    cache.append(0, *draw(4096))
    for r in requests[1:]:
        cache.fork(0, r)
    for r in requests:
        cache.append(r, *draw(64))
    q = draw(16)[0]
    works = [[shared(cache, requests)], [alone(cache, requests)]]
    once, each = ((lambda work=work: flashinfer(q, [1] * 16, cache, requests, work)) for work in works)
    found = [1 - 1 / lab.ratio(once, each, repeats=3).value for _ in range(5)]
    keys = {"keys read": [sum(c.length for c in work[0]) for work in works]}
    return lab.at_least(found, 0.13, unit="of the time", numbers=keys)


ASKED = {0: 1, 1: 3, 2: 1, 3: 7, 4: 1, 5: 2, 6: 1}


def drawn(*, size: int) -> tuple[Tensor, Pages]:
    """Queries of ASKED, six heads on two, and their cache in float64.

    Written in turns; 4 is forked off 2, 5 off 4, and 6 off 3 with nothing of its own.
    """
    torch.manual_seed(0)
    cache = Pages(400 // size + 10, size)
    write = lambda r, n: cache.append(r, *torch.randn(2, n, 2, 5, dtype=torch.float64))
    for r, n in ((0, 1), (1, 9), (2, 21), (3, 30), (1, 4), (2, 20)):
        write(r, n)
    cache.fork(2, 4)
    for r, n in ((4, 3), (2, 11)):
        write(r, n)
    cache.fork(4, 5)
    for r, n in ((5, 9), (4, 2)):
        write(r, n)
    cache.fork(3, 6)
    return torch.randn(sum(ASKED.values()), 6, 5, dtype=torch.float64), cache
