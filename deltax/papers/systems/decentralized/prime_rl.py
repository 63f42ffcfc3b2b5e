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

from deltax import Part, UserError, paper
from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.papers.language.post_training.grpo import Rollouts, grpo, k3, log_probs
from deltax.papers.rl.ppo import ppo
from deltax.papers.systems.decentralized.shardcast import shardcast
from deltax.papers.systems.decentralized.toploc import Limits, Proof, last_hidden, toploc, verify
from deltax.parts.training.generate import generate
from deltax.parts.training.modes import evaluating
from deltax.parts.training.objectives import over_tokens
from deltax.shapes import Logits, PerExample, Tokens


@needs(model=TOKENS_TO_LOGITS, inner=("Referenced",))
class Lagging(nn.Module):
    """The inner model, and its policy as it was at the last `lag` steps, for the workers. Tokens (B, T) -> (B, T, V).

    `past` is in the state, so that a resumed run has the same workers; before step `lag` they have the first weights.
    """

    def __init__(self, vocab: int, context: int, *, inner: Part, lag: int):
        super().__init__()
        if lag < 1:
            raise UserError(f"workers that lag do so by at least one step, not {lag}; without this part they do not")
        self.inner = inner(vocab=vocab, context=context)
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


@needs("tokens", "said", "advantages", "old", "reference", model=TOKENS_TO_LOGITS)
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
    with evaluating(model), last_hidden(model) as found:
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
    with evaluating(model), last_hidden(model) as states:
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


@paper(on=(grpo, shardcast, toploc), replaces=grpo, year=2025, arxiv="2505.07291", whole="gpt+grpo")
def prime_rl(recipe: Part, *, lag: int = 2, delta: float = 4.0) -> Part:
    recipe = recipe.fill("objective", two_sided_relative, delta=delta)
    return recipe.wrap("model", Lagging, lag=lag).wrap("batches", late) if lag else recipe


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
