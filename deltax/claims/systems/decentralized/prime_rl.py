"""Claims of prime-rl: the paper's equations, parity with peers, and what it measures."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, claim
from deltax.claims.language.post_training.grpo import trl_loss
from deltax.papers.language.post_training.grpo import group_relative, grpo, log_probs, rollouts
from deltax.papers.rl.ppo import ppo
from deltax.papers.systems.decentralized.prime_rl import (
    Lagging,
    Submission,
    faults,
    prime_rl,
    two_sided,
    two_sided_relative,
    winnings,
    work,
)
from deltax.papers.systems.decentralized.toploc import last_hidden, toploc
from deltax.parts.training.generate import generate
from deltax.parts.training.run import Loop
from deltax.tasks.language.arithmetic import Arithmetic


@claim
def the_loss_of_a_bad_token_is_bounded():
    """For negative advantages the two-sided loss is at most delta |A|, where PPO's grows with the ratio. Elsewhere both
    are equal to the bit.
    """
    log_ratio = torch.linspace(-9, math.log(1e4), 999, dtype=torch.float64).requires_grad_()
    zero = torch.zeros_like(log_ratio)
    for advantage in (-1.7, 0.6):
        a = torch.full_like(zero, advantage)
        ours, plain = two_sided(log_ratio, zero, a), ppo(log_ratio, zero, a)
        beyond = log_ratio > math.log(4.0)
        slopes = [torch.autograd.grad(loss.sum(), log_ratio)[0] for loss in (ours, plain)]
        if advantage > 0:
            assert torch.equal(ours, plain) and torch.equal(*slopes)
            continue
        assert ours.max() <= 4 * 1.7 * (1 + 1e-12) and not slopes[0][beyond].any()
        assert plain.max() > 0.99 * 1e4 * 1.7 and slopes[1].max() > 0.99 * 1e4 * 1.7
        assert torch.equal(ours[~beyond], plain[~beyond]) and torch.equal(slopes[0][~beyond], slopes[1][~beyond])


@claim
def without_lag_and_delta_it_is_grpo():
    """With lag 0 and delta infinite, batches are GRPO's, and for answers of one length loss and gradients equal GRPO's
    to the bit. Otherwise answers weigh by length.
    """
    from deltax.papers.language.models.gpt import gpt

    tree = gpt + grpo(group=3, questions=2)
    ours = tree + prime_rl(lag=0, delta=float("inf"))
    assert ours["model"] == tree["model"] and ours["batches"] == tree["batches"]
    model, task = _tiny(tree), Arithmetic()
    batch = rollouts(model, task, 0, size=6, seed=0, group=3)
    uneven = batch._replace(old=batch.old + torch.randn_like(batch.old), advantages=torch.randn(6))
    batch = uneven._replace(said=torch.ones_like(batch.said))
    losses = [tree["objective"](model, batch), ours["objective"](model, batch)]
    weights = list(model.policy.parameters())
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss.sum(), weights) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not torch.equal(two_sided_relative(model, batch, delta=1.3), group_relative(model, batch))
    lengths = uneven.said.sum(1)
    assert lengths.min() < lengths.max()
    torch.testing.assert_close(
        two_sided_relative(model, uneven, delta=float("inf")).mean(),
        (group_relative(model, uneven) * lengths).sum() / lengths.sum(),
    )


@claim
def workers_have_the_weights_of_some_steps_ago():
    """Over 5 steps with lag 2, rollouts equal, to the bit, those of the weights of step t - 2, and before step 2 of the
    first weights.
    """
    from deltax.papers.language.models.gpt import gpt

    tree, task, lag = gpt + grpo(group=3, questions=2), Arithmetic(), 2
    model = _tiny(tree + prime_rl(lag=lag))
    draw = (tree + prime_rl(lag=lag))["batches"]
    history = []
    for step in range(5):
        history.append(deepcopy(model.inner))
        torch.manual_seed(step)
        found = draw(model, task, step, size=6, seed=0)
        torch.manual_seed(step)
        expected = tree["batches"](history[max(0, step - lag)], task, step, size=6, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for name, p in model.inner.policy.named_parameters():
            assert torch.equal(p, dict(history[-1].policy.named_parameters())[name])
            p.data += 0.3 * torch.randn_like(p)


@claim
def an_honest_worker_wins_no_bet():
    """For a random policy over two dependent tokens, both bets have expectation 1 to 1e-12. On 999 tokens of a flatter
    or sharper policy the matching bet gains over e^50.
    """
    torch.manual_seed(0)
    first = torch.log_softmax(3 * torch.randn(5, dtype=torch.float64), -1)
    second = torch.log_softmax(3 * torch.randn(5, 5, dtype=torch.float64), -1)
    worth = torch.zeros(2, dtype=torch.float64)
    for a in range(5):
        for b in range(5):
            won = winnings(torch.stack([first, second[a]]), torch.tensor([a, b]))
            worth += (first[a] + second[a, b]).exp() * torch.tensor(won, dtype=torch.float64).exp()
    torch.testing.assert_close(worth, torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
    many = first.expand(999, 5)
    for power, bet in ((0.2, 0), (5.0, 1)):
        tokens = torch.multinomial(torch.softmax(power * first, -1), 999, replacement=True)
        assert winnings(many, tokens)[bet] > 50 and winnings(many, tokens)[1 - bet] < 0


@claim
def what_strangers_send_is_verified():
    """An honest submission passes. Eight kinds of tampering (questions, rewards, weights, proofs, ends, greedy tokens)
    are refused, each with its reason.
    """
    from deltax.papers.language.models.gpt import gpt

    tree, task = gpt.fill("task", Arithmetic), Arithmetic()
    model, other = _tiny(tree), _tiny(tree, seed=1)
    sent = work(model, task, node=3, step=5, count=1, size=40)
    assert faults(sent, model, task) == []
    assert faults(sent._replace(count=2), model, task) == ["other questions than were given"]
    assert faults(sent._replace(rewards=1 - sent.rewards), model, task) == ["other rewards than the task's"]
    assert "activations of other weights" in faults(work(other, task, node=3, step=5, count=1, size=7), model, task)
    for proofs in (
        [*sent.proofs[1:], sent.proofs[0]],
        sent.proofs[1:],
        [[proof._replace(coefficients=proof.coefficients[:1]) for proof in row] for row in sent.proofs],
    ):
        assert faults(sent._replace(proofs=proofs), model, task) == ["activations of other weights"]
    likeliest = generate(model, sent.tokens[:, :6], length=task.answer, temperature=0)
    assert faults(_read_in(sent, model, task, likeliest), model, task) == ["tokens that were not drawn from the policy"]
    never = model.get_submodule("head").register_forward_hook(lambda _, given, out: out - 40 * _one(out, task.end))
    ended = torch.cat([sent.tokens[:, :7], torch.full((40, 3), task.end)], 1)
    assert "an answer ends where it would not" in faults(_read_in(sent, model, task, ended), model, task)
    never.remove()


@claim.parity(peer="trl GRPOTrainer")
def equals_trl():
    """Off-policy, loss and gradient equal trl's GRPOTrainer with delta=4 and loss_type "bnpo" (mean over all tokens) to
    1e-10.
    """
    from deltax.papers.language.models.gpt import gpt

    tree, task = gpt + grpo(group=3, questions=2), Arithmetic()
    model = _tiny(tree).double()
    batch = rollouts(model, task, 0, size=6, seed=0, group=3)
    old, reference = (x + scale * torch.randn(6, 4) for x, scale in ((batch.old, 2.0), (batch.reference, 0.5)))
    batch = batch._replace(said=batch.said.double(), old=old, reference=reference, advantages=torch.randn(6).double())
    theirs, _ = trl_loss(model, batch, loss_type="bnpo", delta=4.0)
    losses = two_sided_relative(model, batch).mean(), theirs
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    weights = list(model.policy.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss, weights) for loss in losses), rtol=1e-10, atol=1e-12)
    above = (log_probs(model, batch.tokens, 4) - batch.old > math.log(4.0)) & (batch.advantages[:, None] < 0)
    assert (above & batch.said.bool()).any() and batch.said.min() == 0


@claim.measured(paper="answers up to four steps old train as well as fresh ones; the run had two")
def two_steps_of_lag_cost_little(lab):
    """On arithmetic (3 seeds), 150 updates with lag 2 end at most 3 points of sampled accuracy below 150 with no lag.

    All start from 600 supervised steps; 8 questions a step, 16 answers each. Lags 4 and 8, and 8 with PPO's clip alone,
    are reported beside.
    """
    small = lab.recipe("gpt(dim=64, depth=2, heads=2)").fill("task", Arithmetic).set(Loop, batch=128)
    kinds = {"no lag": (0, 4.0), **{f"lag {lag}": (lag, 4.0) for lag in (2, 4, 8)}, "lag 8, one-sided": (8, math.inf)}
    wrong: dict[str, list[float]] = {name: [] for name in ("at the start", *kinds)}
    largest: dict[str, list[float]] = {name: [] for name in kinds}
    for seed in lab.seeds(3):
        start = lab.train(small, seed=seed, steps=600)
        wrong["at the start"].append(start.score)
        for name, (lag, delta) in kinds.items():
            recipe = small + grpo(questions=8) + prime_rl(lag=lag, delta=delta)
            run = lab.train(recipe, seed=seed, steps=150, rate=0.3, weights=start.model.state_dict())
            wrong[name].append(1.0 if run.diverged else run.score)
            largest[name].append(max(loss for _, loss in run.losses))
    gaps = [late - fresh for fresh, late in zip(wrong["no lag"], wrong["lag 2"], strict=True)]
    numbers = {f"{name}: wrong": values for name, values in wrong.items()}
    numbers |= {f"{name}: largest loss": values for name, values in largest.items()}
    return lab.at_most(gaps, 0.03, unit="of sampled answers", numbers=numbers)


def _read_in(sent: Submission, model: nn.Module, task: Any, tokens: Tensor) -> Submission:
    """Other tokens with their own rewards, and proofs by one pass of the promised model."""
    with torch.no_grad(), last_hidden(model) as found:
        model(tokens[:, :-1])
    proofs = [toploc(row, prompt=tokens.shape[1] - task.answer) for row in found[0]]
    return sent._replace(tokens=tokens, rewards=task.reward(tokens), proofs=proofs)


def _one(logits: Tensor, token: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(token), logits.shape[-1])


def _tiny(tree: Part, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    path = next(p for p, value in [("model", tree["model"]), *tree.walk()] if p.endswith("dim"))
    model = tree.put(path, 12).put(path.replace("dim", "stack.depth"), 1)().build(Arithmetic().facts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in [*model.modules()][::-1]:
        if hasattr(module, "reference") or isinstance(module, Lagging):
            module.reset_parameters()
    return model
