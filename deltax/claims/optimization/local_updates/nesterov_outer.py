"""Claims of nesterov-outer: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import Part, claim, part
from deltax.claims.checking import loss_on_batch, small_classifier
from deltax.claims.optimization.optimizers.nesterov import descend_ahead
from deltax.papers.optimization.local_updates.local_sgd import LocalSteps, average
from deltax.papers.optimization.local_updates.nesterov_outer import (
    nesterov_outer,
    outer_adam,
    outer_momentum,
    outer_nesterov,
)
from deltax.parts.distributed.exchange import Ring
from deltax.parts.distributed.replicas import flat
from deltax.parts.training import optimizers


@claim
def rate_one_without_momentum_is_averaging():
    """With rate 1 and no momentum, what is shared after every round is local SGD's, to the bit."""
    (ours, _), (theirs, _) = (_train(outer) for outer in (part(outer_nesterov, lr=1.0, momentum=0.0), part(average)))
    assert torch.equal(ours, theirs)


@claim
def rounds_are_steps_of_nesterovs_momentum():
    """Round after round, what is shared moves as `nesterov` would along the means of the workers' pseudo-gradients."""
    end, met = _train(part(outer_nesterov, lr=0.7, momentum=0.9))
    weight, velocity = met[0][0], None
    for before, mean in met:
        torch.testing.assert_close(before, weight, rtol=1e-12, atol=1e-12)
        weight, velocity = descend_ahead(weight, mean, velocity, lr=0.7, momentum=0.9)
    torch.testing.assert_close(end, weight, rtol=1e-12, atol=1e-12)
    assert len(met) == 4 and (end - met[0][0]).abs().max() > 0.1


@claim.parity(peer="torch.optim.SGD(nesterov=True), torch.optim.AdamW")
def equals_a_loop_over_torchs_optimizers():
    """Rounds of a bare loop over copies of a model, each with torch's AdamW, whose mean difference is then the gradient
    of torch's SGD with Nesterov's momentum, come to the same weights.
    """
    import copy

    shared = small_classifier()
    models = [copy.deepcopy(shared) for _ in range(3)]
    inners = [torch.optim.AdamW(m.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0) for m in models]
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for round in range(4):
        for worker, (model, inner) in enumerate(zip(models, inners, strict=True)):
            model.load_state_dict(shared.state_dict())
            for step in range(5):
                inner.zero_grad()
                loss_on_batch(model, 3 * (5 * round + step) + worker).backward()
                inner.step()
        for p, *moved in zip(shared.parameters(), *(m.parameters() for m in models), strict=True):
            p.grad = p.detach() - torch.stack([q.detach() for q in moved]).mean(0)
        outer.step()
    ours, _ = _train(part(outer_nesterov))
    torch.testing.assert_close(ours, flat(list(shared.parameters())).detach(), rtol=1e-10, atol=1e-10)


@claim.measured(paper="Nesterov's momentum ends lowest, before SGD, SGD with momentum and Adam (Figure 6)")
def better_than_averaging(lab):
    """With 4 workers that meet after every 10 steps, outer Nesterov ends at least 0.02 bits per byte below the best of
    averaging, outer momentum and outer Adam, each at its rate of the paper.
    """
    apart = lab.recipe("gpt+local-sgd(every=10)")
    others = {"average": average, "momentum": outer_momentum, "adam": outer_adam}
    seeds = lab.seeds(3)
    ends = {name: [lab.train(apart.fill("outer", make), seed=s).score for s in seeds] for name, make in others.items()}
    ours = [lab.train(apart + nesterov_outer, seed=s).score for s in seeds]
    best = min(ends, key=lambda name: sum(ends[name]))
    gaps = [theirs - mine for theirs, mine in zip(ends[best], ours, strict=True)]
    return lab.at_least(gaps, 0.02, unit="bits per byte", numbers={**ends, "nesterov": ours, "best other": best})


class _Watched(Ring):
    """Remembers every mean that it found."""

    def among(self, vectors):
        self.found = [*getattr(self, "found", []), super().among(vectors)]
        return self.found[-1]


def _train(outer: Part) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Four rounds of five steps of three workers: what is shared, and before each round with the mean it found."""
    model, before = small_classifier(), []
    inner = part(optimizers.adamw, lr=0.05, weight_decay=0.0)
    optimizer = LocalSteps(model, inner=inner, workers=3, every=5, outer=outer, exchange=part(_Watched))
    for turn in range(60):
        if turn % 15 == 0:
            before.append(flat(optimizer.shared).detach().clone())
        optimizer.zero_grad()
        loss_on_batch(model, turn).backward()
        optimizer.step()
    return flat(optimizer.shared).detach(), list(zip(before, optimizer.exchange.found, strict=True))
