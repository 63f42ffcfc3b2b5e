"""INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning.
Prime Intellect Team, Jaghouar, Mattern, Ong, Straube, Basra, Pazdera, Thaman, Di Ferrante, Gabriel, Obeid, Erdem,
Keiblinger, Hagemann, 2025. arXiv:2505.07291

GRPO, but answers come from strangers whose weights are a few steps old: what they send is verified before it is learnt
from, and the ratio of policies is clipped from above also where the answer was bad.

Weights reach the workers by SHARDCAST, while training goes on. PPO's loss of a bad token that has become likelier has
no bound; here its ratio counts as `delta` at most, and all tokens of a batch count alike. A submission must show that
its questions and seed were those it was given, that each answer ends where it says, that its reward is the task's, that
its tokens were drawn, and by TOPLOC that the promised weights computed it.

The paper looks at a histogram of the tokens' chances; here two bets are made against the worker, which an honest one
loses whatever the model. One update is made of each batch here, so the ratio is taken to the policy that answered; the
paper makes several, and takes it to the trainer's at the first of them. Its entropy bonus, its filters of problems and
its reward for a length aimed at are left out, the last two since sums have answers of three or four digits.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper
from deltax.papers.language.grpo import Rollouts, group_relative, grpo, k3, log_probs, rollouts, trl_loss
from deltax.papers.rl.ppo import ppo
from deltax.papers.systems.shardcast import shardcast
from deltax.papers.systems.toploc import Limits, Proof, last_hidden, toploc, verify
from deltax.parts.generate import generate
from deltax.parts.objectives import over_tokens
from deltax.parts.run import Loop
from deltax.shapes import Logits, PerExample, Tokens
from deltax.tasks.arithmetic import Arithmetic


class Lagging(nn.Module):
    """The inner model, and its policy as it was at the last `lag` steps, for the workers. Tokens (B, T) -> (B, T, V).

    `past` is in the state, so that a resumed run has the same workers; before step `lag` they have the first weights.
    """

    def __init__(self, vocab: int, context: int, *, inner: Part, lag: int):
        super().__init__()
        if lag < 1:
            raise UserError(f"workers that lag do so by at least one step, not {lag}; without this part they do not")
        self.inner = inner(vocab, context)
        self.past = nn.ModuleList(deepcopy(self.inner.policy) for _ in range(lag)).requires_grad_(False)
        self.register_load_state_dict_pre_hook(_begin_from_plain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for old in self.past:
            old.load_state_dict(self.inner.policy.state_dict())

    def forward(self, tokens: Tokens, *ctx: Any) -> Logits:
        return self.inner(tokens, *ctx)

    def as_of(self, step: int, call: Callable[[nn.Module], Any]) -> Any:
        """call(the inner model with its policy of `lag` steps ago); what it is now is kept for `lag` steps on."""
        now, place = self.inner.policy, self.past[step % len(self.past)]
        self.inner.policy = place
        try:
            return call(self.inner)
        finally:
            self.inner.policy = now
            place.load_state_dict(now.state_dict())


def late(model: Lagging, task: Any, step: int, *, size: int, seed: int, inner: Part) -> Rollouts:
    """What `inner` draws, by the policy of some steps ago."""
    return model.as_of(step, lambda workers: inner(workers, task, step, size=size, seed=seed))


def two_sided(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip: float = 0.2, delta: float = 4.0
) -> Float[Tensor, "..."]:
    """-min(min(r, delta) A, clamp(r, 1 - clip, 1 + clip) A): PPO's loss of a ratio of `delta` at most.

    Raises UserError where delta does not exceed 1 + clip.
    """
    if delta <= 1 + clip:
        raise UserError(f"delta lies above 1 + clip = {1 + clip:g}, where the other clip is; {delta:g} does not")
    return ppo(torch.minimum(log_probs, old.detach() + math.log(delta)), old, advantages, clip=clip)


@over_tokens
def two_sided_relative(
    model: nn.Module, batch: Rollouts, *, clip: float = 0.2, beta: float = 0.04, delta: float = 4.0
) -> PerExample:
    """GRPO's loss with the ratio clipped on both sides; its mean over the batch is one over all tokens."""
    new, lengths = log_probs(model, batch.tokens, batch.said.shape[1]), batch.said.sum(1)
    losses = two_sided(new, batch.old, batch.advantages[:, None], clip=clip, delta=delta)
    losses = ((losses + beta * k3(new, batch.reference)) * batch.said).sum(1) / lengths
    return losses * (lengths / lengths.mean())


class Submission(NamedTuple):
    """What a worker sends: who it is, which of its batches for which step, answers, rewards, and a proof of each."""

    node: int
    step: int
    count: int
    tokens: Tensor
    rewards: Tensor
    proofs: list[list[Proof]]

    @property
    def seed(self) -> int:
        """Fixed by node, step and count, so that nobody chooses easy questions."""
        return seed_of(self.node, self.step, self.count)


def seed_of(node: int, step: int, count: int) -> int:
    """node * 2^40 + step * 2^20 + count, each of 20 bits. Raises UserError outside of that."""
    if not all(0 <= part < 2**20 for part in (node, step, count)):
        raise UserError("node, step and count are from 0 to 2**20 - 1")
    return (node * 2**20 + step) * 2**20 + count


@torch.no_grad()
def work(model: nn.Module, task: Any, *, node: int, step: int, count: int, size: int) -> Submission:
    """An honest worker's answers to the `size` questions that it is given, with their rewards and proofs."""
    seed = seed_of(node, step, count)
    questions = task.prompts(step, size=size, seed=seed)
    with last_hidden(model) as found:
        tokens = generate(model, questions, length=task.answer, generator=torch.Generator().manual_seed(seed))
    proofs = [toploc(row, prompt=questions.shape[1]) for row in torch.cat(found, 1)]
    return Submission(node, step, count, tokens, task.reward(tokens), proofs)


@torch.no_grad()
def faults(
    submission: Submission, model: nn.Module, task: Any, *, limits: Limits | None = None, rare: float = 1e-6
) -> list[str]:
    """Why a submission is refused; an empty list where it is not.

    model   the policy that it was promised of, whose hidden states the proofs are held against
    rare    the chance that tokens that were drawn from it are taken for others, and the least chance of an end
    """
    tokens, found = submission.tokens, []
    try:
        questions = task.prompts(submission.step, size=len(tokens), seed=submission.seed)
    except (TypeError, ValueError):
        return ["other questions than were given"]
    length = questions.shape[1]
    if tokens.shape[1:] != (length + task.answer,) or not torch.equal(tokens[:, :length], questions):
        return ["other questions than were given"]
    if tokens.min() < 0 or tokens.max() >= task.facts["vocab"]:
        return ["tokens that are none"]
    if not torch.equal(submission.rewards, task.reward(tokens)):
        found.append("other rewards than the task's")
    with last_hidden(model) as states:
        chances = torch.log_softmax(model(tokens[:, :-1])[:, -task.answer :].float(), -1)
    ended = (tokens[:, length:] == task.end).int()
    said = ended.cumsum(1) - ended == 0
    drawn = chances.gather(-1, tokens[:, length:, None])[..., 0]
    if (drawn < math.log(rare))[said & ended.bool()].any():
        found.append("an answer ends where it would not")
    if max(winnings(chances[said], tokens[:, length:][said])) > math.log(2 / rare):
        found.append("tokens that were not drawn from the policy")
    try:
        errors = [verify(h, p, prompt=length) for h, p in zip(states[0], submission.proofs, strict=True)]
        honest = all((limits or Limits()).accept(error) for row in errors for error in row)
    except (TypeError, ValueError):
        honest = False
    if not honest:
        found.append("activations of other weights")
    return found


def winnings(chances: Float[Tensor, "N V"], tokens: Int[Tensor, "N"]) -> list[float]:
    """The log of what two bets of 1 have grown to, that the tokens come from a flatter and from a sharper policy.

    chances  log-probabilities of each token's policy p; the bets are on p^1/2 and p^2, normalised, at fair odds

    Where each token was drawn from p a bet is worth 1 in expectation, so that the chance of a log above
    -log(rare) is `rare` at most (Markov's inequality).
    """
    bets = [torch.log_softmax(power * chances, -1) - chances for power in (0.5, 2.0)]
    return [bet.gather(-1, tokens[:, None]).double().sum().item() for bet in bets]


@paper(on=(grpo, shardcast, toploc), year=2025, arxiv="2505.07291", whole="gpt+grpo")
def prime_rl(recipe: Part, *, lag: int = 2, delta: float = 4.0) -> Part:
    recipe = recipe.fill("objective", two_sided_relative, delta=delta)
    return recipe.wrap("model", Lagging, lag=lag).wrap("batches", late) if lag else recipe


@claim
def the_loss_of_a_bad_token_is_bounded():
    """At a negative advantage the two-sided loss is at most delta |A| and flat beyond; PPO's grows with the ratio. At a
    positive one, and wherever the ratio is at most delta, the two are the same, to the bit.
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
    """With no lag and no bound the recipe draws GRPO's batches with GRPO's model, and where answers are of one length
    its loss and gradients are GRPO's, to the bit, off the old policy too; else a longer one counts for more.
    """
    from deltax.papers.language.gpt import gpt

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
    """At step t the answers are those of the weights at step t - lag, with their log-probabilities, to the bit; before
    step lag, of the first weights.
    """
    from deltax.papers.language.gpt import gpt

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
    """The expectation of both bets is 1 for every policy, and their product's over tokens that depend on those before;
    they grow without bound on tokens of a flatter or of a sharper policy.
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
    """An honest submission passes; another's questions, a claimed reward, other weights, a proof of other text, a proof
    too small, a missing proof, an end that was written in, and tokens that were not drawn do not, each for its reason.
    """
    from deltax.papers.language.gpt import gpt

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
    """Far off the old policy the loss and its gradient equal trl's with delta=4 and loss_type "bnpo", which takes the
    mean over all tokens."""
    from deltax.papers.language.gpt import gpt

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
    """From a short supervised start, 150 updates on answers two steps old end at most 3 points of sampled accuracy
    below 150 on fresh answers, seed by seed.

    8 questions, each answered 16 times, a step; lags of 4 and of 8, that with PPO's clip alone too, are told beside.
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


def _begin_from_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The state of a plain model, or of one with its reference, to start from: the workers have the same."""
    ours = [key for key in state if key.startswith(prefix)]
    if not any(key.startswith(f"{prefix}inner.") for key in ours):
        for key in ours:
            value, rest = state.pop(key), key.removeprefix(prefix)
            state[f"{prefix}inner.{rest}"] = value
            if not rest.startswith("reference."):
                for i in range(len(module.get_submodule("past")._modules)):
                    state[f"{prefix}past.{i}.{rest.removeprefix('policy.')}"] = value


def _read_in(sent: Submission, model: nn.Module, task: Any, tokens: Tensor) -> Submission:
    """Tokens from elsewhere with their own rewards, and proofs by one pass of the promised model over them."""
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
