"""Claims of ring-attention: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltax import claim, part
from deltax.claims.agreement import every_rule
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.systems.attention_kernels.ring_attention import ring, ring_attention, travel
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import Rules, causal, everywhere
from deltax.parts.distributed.ring import Held, Ring, as_first, heard_of_all, in_threads, joined, share
from deltax.parts.distributed.ring_trace import Traced, Transfer, drawn


@claim
def it_is_attention_wherever_the_blocks_are():
    """Over 1 to 4 members and for every rule, output and gradients equal attention's over the whole sequence to
    1e-12.
    """
    for size in (1, 2, 3, 4):
        for rules in every_rule(12).values():
            _check(size, rules)


@claim
def a_ring_of_one_is_the_kernel_inside():
    """On a ring of one, output and gradients equal FlashAttention-2's to the bit (31 positions, causal)."""
    from deltax.papers.systems.attention_kernels.flash_attention_2 import flash_attention_2

    torch.manual_seed(0)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 31, 4, 5, dtype=torch.float64))
    found = []
    for kernel in (flash_attention_2, ring_attention):
        out = kernel(q, k, v, Rules(mask=part(causal)), tile=7)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@claim
def each_block_is_sent_once_to_all():
    """Over 2 to 4 members, each sends keys and values P - 1 times forward and backward, and their gradients P times."""
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 12, 4, 5, dtype=torch.float64)

    def sent(ring: Ring) -> list[int]:
        counts, pass_on = [0], ring.pass_on

        def counted(held: Held) -> Any:
            counts[-1] += sum(t.numel() for t in held if t.is_floating_point())
            return pass_on(held)

        ring.pass_on = counted
        q, k, v = (share(t, ring).clone().requires_grad_() for t in whole)
        at = share(torch.arange(12), ring, 0)
        out = ring_attention(q, k, v, Rules(mask=part(causal), q_at=at, k_at=at), tile=3)
        counts.append(0)
        out.sum().backward()
        return counts

    for size in (2, 3, 4):
        block = 2 * 2 * (12 // size) * 4 * 5
        assert in_threads(size, sent) == [[(size - 1) * block, (size - 1) * block + size * block]] * size


@claim
def the_next_block_is_under_way_while_this_one_is_used():
    """On a ring of 4, each transfer begins before the current block is used, and is waited for after it."""
    torch.manual_seed(0)

    class Told:
        rank, size = 0, 4
        gather = staticmethod(list)

        def pass_on(self, held: Held) -> Any:
            diary.append("begins")
            return lambda: diary.append("waited for") or held

    diary: list[str] = []
    for _ in travel(Told(), ()):
        diary.append("used")
    assert diary == ["begins", "used", "waited for"] * 3 + ["used"]


@claim.measured(paper="activations of 6 b c h bytes a layer for blocks of c, whatever the length (Table 1, section 3)")
def a_models_memory_is_divided_by_the_members(lab):
    """Training six blocks on 8192 positions, each doubling of 1 to 4 processes leaves at most 0.52 of a process's
    memory.
    """
    peak = lambda size: lab.peak_memory(_first_trains, size, 8192, warm=(size, 256 * size))
    return _falls(lab, peak, 0.52)


@claim.measured(paper="a host holds six blocks: queries, output, and two pairs of keys and values (section 3)")
def memory_falls_with_members(lab):
    """For attention alone at 8192 positions, each doubling of 1 to 4 processes leaves at most 2/3 of a process's
    memory.

    Blocks in transfer, which a single process does not have, are still a large part of it.
    """
    peak = lambda size: lab.peak_memory(_first_attends, size, 8192, warm=(size, 64))
    return _falls(lab, peak, 2 / 3)


def _falls(lab: Any, peak: Callable[[int], int], most: float) -> Any:
    import numpy as np

    sizes = (1, 2, 4)
    bytes_ = [[peak(size) for size in sizes] for _ in range(3)]
    slopes = [float(np.polyfit(np.log2(sizes), np.log2(run), 1)[0]) for run in bytes_]
    numbers = {"processes": sizes, "bytes": bytes_, "exponents": slopes}
    return lab.at_most([2**slope for slope in slopes], most, unit="of the memory", numbers=numbers)


@claim.measured(paper="transfers are fully hidden where a block has at least F/B positions (section 3, Eq. 4)")
def transfers_hide_behind_tiles(lab):
    """Over two processes at 8192 positions, the wait for a block while computing is at most half the wait while
    idle.
    """
    both = heard_of_all(2, _waits, 8192, 6, patience=200)
    traces = heard_of_all(2, _transfers, 2048, patience=200)
    waits = [[sum(pair) for pair in zip(*turn, strict=True)] for turn in zip(*both, strict=True)]
    numbers = {"seconds idle, seconds computing": waits}
    caption = "Attention to 2048 positions over two processes, forward and backward, and when each block arrived"
    figures = {caption: lab.figure(drawn(traces))}
    ratios = [computing / idle for idle, computing in waits]
    return lab.at_most(ratios, 0.5, unit="of the wait", numbers=numbers, figures=figures)


def _first_trains(size: int, time: int) -> None:
    as_first(size, _train, time)


def _train(member: Ring, time: int) -> None:
    from deltax.papers.language.models.gpt import gpt

    torch.manual_seed(0)
    recipe = (gpt + ring(tile=256)).put("model.stack.depth", 6)
    model = recipe().build({"vocab": 256, "context": time})
    tokens, at = share(torch.randint(256, (1, time)), member), share(torch.arange(time), member, 0)
    cross_entropy(model(tokens, Context(positions=at)).flatten(0, 1), tokens.flatten()).backward()


def _first_attends(size: int, time: int) -> None:
    as_first(size, _attend, time)


def _attend(ring: Ring, time: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, time // ring.size, 1, 256, requires_grad=True) for _ in range(3))
    at = share(torch.arange(time), ring, 0)
    ring_attention(q, k, v, Rules(mask=part(causal), q_at=at, k_at=at), tile=128).sum().backward()


def _waits(ring: Ring, time: int, turns: int) -> list[tuple[float, float]]:
    """Seconds waited for a block, idle and while computing tiles, for each turn."""
    timed = _Timed(ring)
    at = share(torch.arange(time), ring, 0)
    q, k, v = torch.randn(3, 1, time // ring.size, 8, 64)
    rules = Rules(mask=part(everywhere), q_at=at, k_at=at)
    idle, computing = lambda: list(travel(timed, (k, v, at))), lambda: ring_attention(q, k, v, rules, tile=512)

    def waited(call: Callable[[], Any]) -> float:
        ring.gather([0])
        timed.waited = 0.0
        with joined(timed), torch.no_grad():
            call()
        return timed.waited

    return [(waited(idle), waited(computing)) for _ in range(turns + 1)][1:]


def _transfers(_: Ring, time: int) -> list[Transfer]:
    """The transfers of one forward and backward pass, after one to warm up."""
    ring = Traced()
    at = share(torch.arange(time), ring, 0)
    rules = Rules(mask=part(everywhere), q_at=at, k_at=at)
    with joined(ring):
        for _ in range(2):
            q, k, v = (torch.randn(1, time // ring.size, 8, 64, requires_grad=True) for _ in range(3))
            ring.gather([0])
            ring.transfers.clear()
            ring_attention(q, k, v, rules, tile=256).sum().backward()
    return ring.transfers


class _Timed:
    """A ring that adds up the seconds waited for arrivals."""

    def __init__(self, inner: Ring):
        self.rank, self.size, self.gather, self._inner, self.waited = inner.rank, inner.size, inner.gather, inner, 0.0

    def pass_on(self, held: Held) -> Any:
        arrival = self._inner.pass_on(held)

        def wait() -> Held:
            asked = perf_counter()
            arrived = arrival()
            self.waited += perf_counter() - asked
            return arrived

        return wait


def _check(size: int, rules: Rules, time: int = 12) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, time, 6, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, time, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, learned = torch.randn_like(q), tuple(rules.learned.values())
    out = attend(q, k, v, rules)
    expected = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v, *learned))]

    def member(ring: Ring) -> list[Tensor]:
        ours = [share(t.detach(), ring).requires_grad_() for t in (q, k, v)]
        heads = ring_attention(*ours, shared(rules, ring, time), tile=5)
        return [heads, *torch.autograd.grad((heads * share(weight, ring)).sum(), (*ours, *learned))]

    found = list(zip(*in_threads(size, member), strict=True))
    whole = [torch.cat(pieces, 1) for pieces in found[:4]] + [torch.stack(parts).sum(0) for parts in found[4:]]
    for theirs, ours in zip(expected, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def shared(rules: Rules, ring: Ring, time: int) -> Rules:
    """A member's share of the rules of a whole sequence of `time` positions."""
    count = torch.arange(time)
    cut = lambda t, axis: None if t is None else share(t, ring, axis)
    return replace(
        rules,
        q_at=share(count if rules.q_at is None else rules.q_at, ring, -1),
        k_at=share(count if rules.k_at is None else rules.k_at, ring, -1),
        q_segments=cut(rules.q_segments, 1),
        k_segments=cut(rules.k_segments, 1),
    )
