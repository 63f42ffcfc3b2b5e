"""What FlashInfer's claims leave open: edges and bad input."""

import pytest
import torch

from deltax import UserError
from deltax.claims.systems.attention_kernels.flashinfer import ASKED, drawn
from deltax.papers.systems.attention_kernels.flashinfer import Chunk, alone, flashinfer, plan, shared
from deltax.parts.attention.pages import PagedState, Pages


def written(*lengths: int, count: int = 10, size: int = 4) -> Pages:
    torch.manual_seed(0)
    cache = Pages(count, size)
    for request, length in enumerate(lengths):
        cache.append(request, *torch.randn(2, length, 1, 3))
    return cache


def test_a_cache_without_a_page_is_refused():
    for count, size in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="at least 1 page"):
            Pages(count, size)


def test_a_full_cache_says_so_and_loses_nothing():
    cache = written(7, 5, count=4)
    kept = [cache.read(r) for r in range(2)]
    with pytest.raises(UserError, match="needs 1 more pages and 0 of 4 are free: close a request"):
        cache.append(0, *torch.randn(2, 2, 1, 3))
    assert [cache.length(r) for r in range(2)] == [7, 5]
    for r in range(2):
        assert all(map(torch.equal, cache.read(r), kept[r]))
    cache.close(1)
    cache.append(0, *torch.randn(2, 2, 1, 3))
    assert cache.length(0) == 9 and cache.taken == 3


def test_a_full_cache_does_not_take_a_forks_page():
    cache = written(6, count=2)
    cache.fork(0, 1)
    with pytest.raises(UserError, match="needs 1 more pages"):
        cache.append(1, *torch.randn(2, 1, 1, 3))
    cache.close(0)
    cache.append(1, *torch.randn(2, 1, 1, 3))  # nobody else has the page now, so it is written in place
    assert cache.length(1) == 7 and cache.taken == 2


def test_unknown_and_taken_requests():
    cache = written(3)
    for attempt in (lambda: cache.read(5), lambda: cache.fork(5, 6), lambda: cache.close(5), lambda: cache.length(5)):
        with pytest.raises(UserError, match=r"no request 5: the cache has \[0\]"):
            attempt()
    with pytest.raises(UserError, match="a request 0 already"):
        cache.fork(0, 0)


def test_a_cache_keeps_no_gradients():
    with pytest.raises(UserError, match=r"torch.no_grad\(\)"):
        written().append(0, torch.randn(2, 1, 3, requires_grad=True), torch.randn(2, 1, 3))


def test_a_decoder_out_of_pages_says_so():
    state, module = PagedState(2, 4), torch.nn.Identity()
    with pytest.raises(UserError, match="close a request"):
        state.append(module, (torch.randn(1, 9, 1, 3), torch.randn(1, 9, 1, 3)), (1, 1))


@pytest.mark.parametrize(
    ("asked", "requests", "work", "says"),
    [
        ([1, 1], [0], None, r"2 queries do not match counts \[1, 1\] of requests \[0\]"),
        ([1, 2], [0, 1], None, "2 queries do not match"),
        ([1, 1], [0, 0], None, "each once"),
        ([2], [9], None, "no request 9"),
        ([2], [2], None, "request 2 has 1 positions and 2 queries"),
        ([1, 1], [0, 1], [[Chunk((0,), 0, 7)]], "reads 0 keys of request 1, and the cache has 5: plan again"),
        ([1, 1], [0, 1], [[Chunk((0, 1), 0, 4)]], "reads 4 keys of request 0"),
        ([2], [1], [[Chunk((0,), 0, 7), Chunk((1,), 0, 5)]], r"requests \[0\], which have no queries"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(asked, requests, work, says):
    with pytest.raises(UserError, match=says):
        flashinfer(torch.randn(2, 1, 3), asked, written(7, 5, 1), requests, work)


def test_a_plan_needs_a_worker():
    with pytest.raises(UserError, match="at least 1 worker"):
        plan([Chunk((0,), 0, 3)], 0)
    assert plan([], 3) == [[], [], []]


def test_a_request_that_asks_nothing_gets_nothing():
    q, cache = drawn(size=4)
    asked = {**ASKED, 3: 0}
    rows = torch.tensor([r for r, n in ASKED.items() for _ in range(n)]) != 3
    every = flashinfer(q, [*ASKED.values()], cache, [*ASKED])
    fewer = flashinfer(q[rows], [*asked.values()], cache, [*asked], [shared(cache, asked)])
    torch.testing.assert_close(fewer, every[rows], rtol=1e-12, atol=1e-12)


def test_sharing_is_found_among_any_requests():
    cache = written(9)
    cache.fork(0, 1)
    cache.append(1, *torch.randn(2, 3, 1, 3))
    cache.append(2, *torch.randn(2, 4, 1, 3))
    chunks = shared(cache, [2, 1, 0])
    assert sorted(chunks) == [Chunk((0,), 8, 9), Chunk((1,), 8, 12), Chunk((1, 0), 0, 8), Chunk((2,), 0, 4)]
    assert alone(cache, [2, 1]) == [Chunk((2,), 0, 4), Chunk((1,), 0, 12)]
