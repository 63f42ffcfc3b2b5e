"""Claims of pipedream: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.claims.systems.parallelism.gpipe import against, layers, orders
from deltax.papers.systems.parallelism.gpipe import all_forward_all_back, gpipe, timed
from deltax.papers.systems.parallelism.pipedream import Stash, one_forward_one_back, pipedream


@claim
def with_a_flush_the_gradient_is_gpipe_s():
    """For three sizes, loss and gradients equal GPipe's to 1e-12 and the uncut model's to 1e-10."""
    for count, cut in ((2, 4), (4, 6), (4, 3)):
        stages, x, y = layers(count)
        loss = against(y, cut)
        whole = torch.autograd.grad(
            nn.functional.mse_loss(nn.Sequential(*stages)(x), y), parameters := list(stages.parameters())
        )
        found = []
        for schedule in (pipedream, gpipe):
            stages.zero_grad()
            found.append((schedule(stages, x.chunk(cut), loss), [p.grad.clone() for p in parameters]))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[0][1], list(whole), rtol=1e-10, atol=1e-12)


@claim
def with_a_flush_the_bubble_is_gpipe_s():
    """For 1 to 5 stages and 1 to 9 micro-batches, the idle share equals GPipe's."""
    for stages in range(1, 6):
        for pieces in (1, 2, 5, 9):
            ours, theirs = (timed(order(stages, pieces)) for order in (one_forward_one_back, all_forward_all_back))
            assert abs(ours.bubble - theirs.bubble) < 1e-12


@claim
def a_stage_holds_no_more_than_its_distance_from_the_end():
    """For four sizes, stage s of K holds min(M, K - s) micro-batches, where GPipe holds M."""
    for stages, pieces in ((4, 8), (4, 2), (3, 3), (5, 20)):
        table = timed(one_forward_one_back(stages, pieces))
        assert [table.held(s) for s in range(stages)] == [min(pieces, stages - s) for s in range(stages)]


@claim
def without_a_flush_gradients_are_as_old_as_the_way_is_long():
    """With 4 stages and a full pipe, stage s applies gradients 3 - s steps late and keeps 4 - s weight versions."""
    stages, x, y = layers(4)
    stash = Stash(stages, rate=0.05)
    stash.run(x.chunk(12), against(y, 12))
    assert [late[4:] for late in stash.stale] == [[3 - s] * 8 for s in range(4)]
    assert stash.kept == [4 - s for s in range(4)]


@claim
def a_piece_goes_back_by_the_weights_it_came_by():
    """With one stage, training equals SGD on each micro-batch to 1e-12; with three stages it differs by over 1e-4."""
    ends = []
    for count in (1, 3):
        stages, x, y = layers(3)
        loss = against(y, 6)
        cut = [nn.Sequential(*stages)] if count == 1 else stages
        Stash(cut, rate=0.1).run(x.chunk(6), loss)
        ends.append(torch.cat([p.detach().flatten() for p in stages.parameters()]))
    stages, x, y = layers(3)
    optimizer = torch.optim.SGD(stages.parameters(), lr=0.1)
    for piece, target in zip(x.chunk(6), y.chunk(6)):
        optimizer.zero_grad()
        nn.functional.mse_loss(nn.Sequential(*stages)(piece), target).backward()
        optimizer.step()
    alone = torch.cat([p.detach().flatten() for p in stages.parameters()])
    torch.testing.assert_close(ends[0], alone, rtol=1e-12, atol=1e-14)
    assert (ends[1] - alone).abs().max() > 1e-4


@claim.parity(peer="torch.distributed.pipelining.Schedule1F1B")
def the_order_is_torch_s():
    """For M >= K in three sizes, each stage's work has the order of torch's Schedule1F1B."""
    from torch.distributed.pipelining import Schedule1F1B

    assert all(one_forward_one_back(k, m) == orders(Schedule1F1B, k, m) for k, m in ((2, 3), (3, 8), (4, 4)))
