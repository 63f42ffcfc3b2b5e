"""Claims of momentum-lookahead: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.optimization.local_updates.async_local_sgd import alike, async_local_sgd
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.papers.optimization.local_updates.momentum_lookahead import LookAhead, momentum_lookahead
from deltax.papers.optimization.local_updates.nesterov_outer import outer_nesterov


@claim
def the_server_stands_ahead():
    """The weights kept are w + d of the two-point form, d = -lr momentum m; w <- w + d - lr g; m <- momentum m +
    (1 - momentum) g, where g was pushed from w + d; whatever is pushed.
    """
    torch.manual_seed(0)
    weight, average = torch.randn(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    kept = nn.Parameter(weight.clone())
    optimizer = LookAhead([kept], lr=0.7, momentum=0.8)
    for _ in range(9):
        push = torch.randn(7, dtype=torch.float64)
        ahead = weight - 0.7 * 0.8 * average
        torch.testing.assert_close(kept.detach(), ahead, rtol=1e-12, atol=1e-12)
        weight, average = ahead - 0.7 * push, 0.8 * average + 0.2 * push
        kept.grad = push
        optimizer.step()


@claim
def without_momentum_pushes_are_applied_as_they_are():
    """With momentum 0 a push moves the weights by rate times itself."""
    torch.manual_seed(0)
    start, push = torch.randn(2, 7, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    weight.grad = push
    LookAhead([weight], lr=0.7, momentum=0.0).step()
    torch.testing.assert_close(weight.detach(), start - 0.7 * push, rtol=1e-12, atol=1e-12)


@claim
def stale_pushes_stay_stable():
    """On a quadratic, with every push three updates late, at rate 0.7 it converges where Nesterov's momentum at every
    push runs away.
    """
    ends = {}
    for name, outer in (("ahead", LookAhead), ("nesterov", outer_nesterov)):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer, known = outer([weight]), [weight.detach().clone()] * 4
        for _ in range(200):
            weight.grad = 0.2 * known.pop(0)
            optimizer.step()
            known.append(weight.detach().clone())
        ends[name] = weight.abs().item()
    assert ends["ahead"] < 1e-3 and ends["nesterov"] > 1e3


@claim.measured(paper="outperforms asynchronous and synchronous DiLoCo, on equal and on different workers (abstract)")
def better_than_delayed_momentum(lab):
    """With equal pushes of workers of speeds 1, 1, 2, 4, it ends at least 0.02 bits per byte below delayed Nesterov."""
    small = lab.recipe("gpt(dim=48, depth=2)").put("loop.batch", 8)
    apart = small + async_local_sgd
    same_pace = apart.fill("pace", alike)
    arms = {
        "look-ahead": apart + momentum_lookahead,
        "delayed": same_pace,
        "naive": same_pace.fill("outer", part(outer_nesterov)),
        "synchronous": small + diloco,
    }
    ends = {name: [lab.train(arm, seed=s, steps=800).score for s in lab.seeds(3)] for name, arm in arms.items()}
    gaps = [a - b for a, b in zip(ends["delayed"], ends["look-ahead"], strict=True)]
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers=ends)
