"""Claims of async-nesterov-pp: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.claims.optimization.optimizers.nesterov import look_ahead
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.local_updates.async_nesterov_pp import async_nesterov_pp, nadam
from deltax.parts.training.delayed_gradients import DelayedGradients


def late_look_ahead(
    weight: Tensor, before: Tensor, late: Tensor, gradient: Callable[[Tensor], Tensor], *, lr: float, momentum: float
) -> Tensor:
    """w + d - lr (1 - momentum) gradient(late), with d = momentum (w - before); `late` is an earlier w + d."""
    return weight + momentum * (weight - before) - lr * (1 - momentum) * gradient(late)


@claim
def without_delay_it_is_nesterovs_momentum():
    """When no gradient is late, the step is Nesterov's at a rate of one minus the momentum times as much."""
    torch.manual_seed(0)
    root = torch.randn(7, 7, dtype=torch.float64) / 3
    gradient = lambda w: root.T @ (root @ w) + w.sin()
    before, weight = torch.randn(2, 7, dtype=torch.float64)
    for _ in range(20):
        ahead = weight + 0.9 * (weight - before)
        ours = late_look_ahead(weight, before, ahead, gradient, lr=0.5, momentum=0.9)
        theirs = look_ahead(weight, before, gradient, lr=0.05, momentum=0.9)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        before, weight = weight, ours


@claim
def the_look_ahead_points_along_the_drift():
    """With random gradients 7 updates late, the look-ahead's cosine with what the weights have drifted meanwhile grows
    with the momentum: below 0.7 at 0.5, above 0.95 at 0.99.
    """
    cosines = {}
    for momentum in (0.5, 0.9, 0.99):
        torch.manual_seed(0)
        path = [torch.zeros(101, dtype=torch.float64)] * 9
        found = []
        for _ in range(600):
            noise = lambda w: w + torch.randn_like(w)
            late = path[-8] + momentum * (path[-8] - path[-9])
            path.append(late_look_ahead(path[-1], path[-2], late, noise, lr=0.01, momentum=momentum))
            found.append(torch.cosine_similarity(path[-1] - path[-2], path[-1] - path[-8], dim=0))
        cosines[momentum] = torch.stack(found[100:]).mean().item()
    assert cosines[0.5] < 0.7 and cosines[0.5] < cosines[0.9] < cosines[0.99] and cosines[0.99] > 0.95


@claim
def each_stage_learns_from_weights_of_its_own_age():
    """At update t, stage s of P computes with its weights of update t - (P - 1 - s), or its first; the last is up to
    date, and what is left at the end are the newest weights of all.
    """
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4))).double()
    optimizer = DelayedGradients(model, inner=part(nadam, lr=0.1), stages=4)
    newest: list[list[Tensor]] = []
    for update in range(9):
        newest.append([versions[-1].clone() for versions in optimizer.versions])
        for stage, p in enumerate(model.parameters()):
            assert torch.equal(p, newest[max(0, update - (3 - stage))][stage])
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert not torch.equal(model[0].weight, optimizer.versions[0][-1])
    optimizer.eval()
    assert all(torch.equal(p, v[-1]) for p, v in zip(model.parameters(), optimizer.versions, strict=True))


@claim.parity(peer="torch.optim.NAdam")
def one_stage_is_nadam():
    """With one stage nothing is late: twenty steps are those of torch's NAdam with decoupled decay, to the bit."""
    torch.manual_seed(0)
    start = torch.randn(5, 7, dtype=torch.float64)
    ours, theirs = nn.Linear(7, 5, bias=False).double(), nn.Parameter(start.clone())
    ours.weight.data.copy_(start)
    a = (gpt + async_nesterov_pp(stages=1)).put("optimizer.inner.lr", 0.05)["optimizer"](ours)
    settings = {"betas": (0.99, 0.999), "weight_decay": 0.01, "decoupled_weight_decay": True}
    b = torch.optim.NAdam([theirs], lr=0.05, **settings)
    for _ in range(20):
        ours.weight.grad = torch.randn_like(start)
        theirs.grad = ours.weight.grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours.weight, theirs) and (theirs - start).abs().max() > 0.05


@claim.measured(paper="beats other asynchronous methods and the synchronous baseline, up to 1B parameters (abstract)")
def better_than_stale_adamw(lab):
    """A gpt of 8 blocks in 8 stages with late gradients ends at least 0.02 bits per byte below the same under AdamW."""
    deep = lab.recipe("gpt(dim=48, depth=8)").put("loop.batch", 8)
    late = deep.wrap("optimizer", DelayedGradients, stages=8)
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=400).score for s in lab.seeds(3)]
    sync, theirs, ours = ends(deep), ends(late), ends(deep + async_nesterov_pp(stages=8))
    gaps = [a - b for a, b in zip(theirs, ours, strict=True)]
    numbers = {"AdamW, on time": sync, "AdamW, late": theirs, "this, late": ours}
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers=numbers)
