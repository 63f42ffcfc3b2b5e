"""The ring over processes of torch.distributed: equal to one process, overlapped, and never hanging."""

import os
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltax import UserError, part
from deltax.claims.systems.attention_kernels.ring_attention import shared
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels import ring_attention as paper
from deltax.papers.systems.attention_kernels.ring_attention import ring, ring_attention
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import Rules, causal, everywhere, window
from deltax.parts.distributed import ring as rings
from deltax.parts.distributed.ring import BrokenRing, Processes, in_processes, in_threads, joined, share
from deltax.parts.distributed.ring_trace import Traced, Transfer, drawn

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


def traced(member):
    """The transfers of one pass, each neighbour's having begun before this process computes."""
    ring, look = Traced(), paper.look_at_all

    def looking(*args):
        if not ring.transfers:
            torch.distributed.barrier()
        return look(*args)

    paper.look_at_all = looking
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 2048, 8, 64)
    at = share(torch.arange(2048), ring, 0)
    with joined(ring), torch.no_grad():
        ring_attention(*(share(t, ring) for t in whole), Rules(mask=part(everywhere), q_at=at, k_at=at), tile=512)
    return ring.transfers


def test_a_transfer_is_under_way_while_tiles_are_computed():
    """The next block has arrived before anybody waits for it, while the one at hand is used."""
    for transfers in in_processes(2, traced):
        (block,) = transfers
        assert block.began < block.arrived < block.wanted and block.hidden


def late(member):
    """The second process sends late, and looks late for what it is sent: what comes, and how long each took."""
    ring, x = Traced(), torch.arange(30_000.0) + member.rank
    ring.gather([0])
    if member.rank == 1:
        time.sleep(0.5)
    arrival = ring.pass_on((x, torch.arange(3)))
    if member.rank == 1:
        time.sleep(0.5)
    came = arrival()
    return came[0][0].item(), came[1].tolist(), ring.transfers


def test_a_trace_tells_when_a_block_arrived_and_not_when_it_was_asked_for():
    """Late is not hidden; and what is asked for late had arrived before."""
    (first, whole, [waited]), (second, _, [lain]) = in_processes(2, late)
    assert (first, second, whole) == (1.0, 0.0, [0, 1, 2])
    assert not waited.hidden and waited.arrived - waited.began > 0.4 and waited.wanted - waited.began < 0.2
    assert lain.hidden and lain.wanted - lain.arrived > 0.2


def test_a_trace_is_drawn():
    """A bar for each time of computing and each transfer, from the earliest on, in milliseconds."""
    (axes,) = drawn([[Transfer(5.0, 5.3, 5.1)], [Transfer(5.1, 5.2, 5.4), Transfer(5.4, 5.5, 5.6)]]).axes
    bars = [
        [(round(p.vertices[:, 0].min()), round(p.vertices[:, 0].max())) for p in c.get_paths()]
        for c in axes.collections
    ]
    assert bars == [[(0, 300)], [(0, 100)], [(100, 200), (400, 500)], [(100, 400), (400, 600)]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["process 0", "process 1"]


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
    with pytest.raises(UserError, match="needs positions"):
        in_threads(2, lambda member: ring_attention(*torch.randn(3, 1, 4, 1, 2)))
