"""The ring over processes of torch.distributed: equal to one process, overlapped, and never hanging."""

import os
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltax import UserError, part
from deltax.papers.language.alibi import Distance
from deltax.papers.language.gpt import gpt
from deltax.papers.language.softmax_attention import attend
from deltax.papers.systems import ring_attention as paper
from deltax.papers.systems.ring_attention import ring, ring_attention, shared
from deltax.parts import ring as rings
from deltax.parts.context import Context
from deltax.parts.ring import BrokenRing, Processes, in_processes, in_threads, joined, share
from deltax.parts.scores import Rules, causal, window

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def heads(time=24, dtype=torch.float64, width=5):
    torch.manual_seed(0)
    return [torch.randn(2, time, n, width, dtype=dtype, requires_grad=True) for n in (6, 2, 2)]


def rules(time=24):
    padded = (torch.arange(time) >= torch.tensor([[19], [time]])).long()
    return [
        Rules(mask=part(causal)),
        Rules(mask=part(window, width=5), q_segments=padded, k_segments=padded),
        Rules(Distance(6), part(causal)),
    ]


def attention(member):
    """Its share of outputs and gradients, by rule."""
    found = []
    for rule in rules():
        ours = [share(t.detach(), member).requires_grad_() for t in heads()]
        out = ring_attention(*ours, shared(rule, member, 24), tile=5)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), ours)])
    return [[t.numpy() for t in each] for each in found]


def model():
    recipe = (gpt + ring(tile=4)).put("model.dim", 12).put("model.stack.depth", 2)
    torch.manual_seed(0)
    return recipe().build({"vocab": 11, "context": 24}).double()


def language_model(member):
    """Its share of the logits, and the gradients of all weights summed over the processes."""
    torch.manual_seed(1)
    tokens, network = torch.randint(11, (2, 24)), model()
    positions = share(torch.arange(24), member, 0)
    logits = network(share(tokens, member), Context(positions=positions))
    functional.cross_entropy(logits.flatten(0, 1), share(tokens, member).flatten(), reduction="sum").backward()
    gradients = nn.utils.parameters_to_vector([p.grad for p in network.parameters()])
    if member.size > 1:
        torch.distributed.all_reduce(gradients)
    return logits.detach().numpy(), gradients.numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_compute_what_one_does(size):
    """Attention and a whole language model, forward and backward; causal, windowed with padding, and alibi."""
    found = in_processes(size, both)
    assert not any(isinstance(f, Exception) for f in found), found
    for i, rule in enumerate(rules()):
        q, k, v = heads()
        out = attend(q, k, v, rule)
        for j, whole in enumerate([out, *torch.autograd.grad(out.square().sum(), (q, k, v))]):
            pieces = torch.cat([torch.from_numpy(member[0][i][j]) for member in found], 1)
            torch.testing.assert_close(pieces, whole, **EXACT)
    logits, gradients = map(torch.from_numpy, language_model(rings.Alone()))
    torch.testing.assert_close(torch.cat([torch.from_numpy(m[1][0]) for m in found], 1), logits, **EXACT)
    for member in found:
        torch.testing.assert_close(torch.from_numpy(member[1][1]), gradients, **EXACT)


def both(member):
    return attention(member), language_model(member)


class Poisoned(Processes):
    """What is to be received is not a number until it has been."""

    last = None

    def _room(self, tensor):
        room = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.empty_like(tensor)
        self.last = room if tensor.is_floating_point() else self.last
        return room


def watched(member):
    """For each block used: whether the next had arrived when its use began, and when it ended, before anyone waited."""
    ring, seen = Poisoned(), []
    look, width = paper.look_at_all, 64

    def looking(*args):
        arriving = ring.last
        ring.last = None
        torch.distributed.barrier()  # a fair start: neighbours have all begun their transfers
        began = arriving is not None and bool(arriving.flatten()[-1].isnan())
        found = look(*args)
        seen.append((arriving is not None, began, arriving is not None and bool(arriving.isfinite().all())))
        return found

    paper.look_at_all = looking
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 2048, 8, width)
    at = share(torch.arange(2048), ring, 0)
    with joined(ring), torch.no_grad(), torch.profiler.profile() as trace:
        ring_attention(*(share(t, ring) for t in whole), Rules(mask=part(causal), q_at=at, k_at=at), tile=512)
    spans = {}
    for event in trace.events():
        spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    return seen, {name: spans.get(name, []) for name in ("ring.attend", "gloo:recv")}


def test_a_transfer_is_under_way_while_tiles_are_computed():
    """The next block arrives while this one is used, before anybody waits for it, and the trace shows both at once."""
    for found in in_processes(2, watched):
        seen, spans = found
        assert [under_way for under_way, *_ in seen] == [True, False]
        assert seen[0][2], "the block had not arrived by the end of the computation that was to hide it"
        used, transfer = spans["ring.attend"][0], spans["gloo:recv"][0]
        assert transfer[0] <= used[0] and used[1] <= transfer[1]


def dies(member, rank, silent):
    ring = Processes(seconds=2)
    at = share(torch.arange(24), ring, 0)
    ours = [share(t, ring) for t in heads()]
    with joined(ring):
        ring_attention(*ours, Rules(q_at=at, k_at=at))
        if ring.rank == rank:
            time.sleep(6) if silent else os._exit(1)
        started = time.monotonic()
        try:
            ring_attention(*ours, Rules(q_at=at, k_at=at))
        except BrokenRing as error:
            return str(error), time.monotonic() - started
    return "no error", 0


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "stalled"])
def test_a_lost_peer_is_an_error_on_every_other_process_in_bounded_time(silent):
    started = time.monotonic()
    found = in_processes(3, dies, 1, silent, patience=40)
    assert time.monotonic() - started < 60
    for rank in (0, 2):
        said, took = found[rank]
        assert f"process {rank} of 3" in said and "died or stalls" in said and took < 15


def uneven(member):
    width = 4 + (member.rank == 1)
    q, at = torch.randn(1, width, 2, 4), torch.arange(width) + 4 * member.rank
    ring_attention(q, q, q, Rules(q_at=at, k_at=at))


def of_three(member):
    Processes(processes=3)


def test_a_wrong_world_is_one_sentence_on_every_process():
    assert all("start 3" in str(error) for error in in_processes(2, of_three))
    for error in in_processes(2, uneven):
        assert isinstance(error, UserError) and "equal shares" in str(error)


def test_without_torchrun_there_are_no_processes():
    with pytest.raises(UserError, match="torchrun"):
        Processes()


def test_positions_that_do_not_divide_or_are_not_given():
    with pytest.raises(UserError, match="pad the sequence to 20"):
        in_threads(4, lambda member: share(torch.zeros(1, 17), member))
    with pytest.raises(UserError, match="where its share stands"):
        in_threads(2, lambda member: ring_attention(*torch.randn(3, 1, 4, 1, 2)))
