"""INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning.
Prime Intellect Team, Jaghouar, Mattern, Ong, Straube, Basra, Pazdera, Thaman, Di Ferrante, Gabriel, Obeid, Erdem,
Keiblinger, Hagemann, 2025. arXiv:2505.07291

GRPO, but untrusted workers generate with weights some steps old, submissions are verified, and ratios clipped twice.

Weights reach workers by SHARDCAST while training goes on. PPO's loss of a token with negative advantage has no bound;
here the ratio counts as at most `delta`, and the loss is a mean over all tokens of a batch. A submission must have the
questions of its seed, proper ends, the task's rewards, sampled tokens, and by TOPLOC the promised weights' activations.

The paper tests a histogram of token probabilities; here two bets are made against the worker, which an honest one
loses for any model. One update is made a batch, so the ratio is to the sampling policy; the paper makes several, with
the ratio to the trainer's first. Its entropy bonus, problem filters and length rewards are left out.
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
    """The inner model, and its policy at the last `lag` steps for the workers. Tokens (B, T) -> (B, T, V).

    `past` is in the state, so that a resumed run has the same workers; before step `lag` they have the first weights.
    """

    def __init__(self, vocab: int, context: int, *, inner: Part, lag: int):
        super().__init__()
        if lag < 1:
            raise UserError(f"lag must be at least 1 step, not {lag}: use prime_rl(lag=0) for no lag")
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
        """call(the inner model with its policy of `lag` steps ago); then stores the current policy."""
        # past[step % lag] holds the weights of step - lag; they are replaced by the current ones
        now, place = self.inner.policy, self.past[step % len(self.past)]
        self.inner.policy = place
        try:
            return call(self.inner)
        finally:
            self.inner.policy = now
            place.load_state_dict(now.state_dict())


def late(model: Lagging, task: Any, step: int, *, size: int, seed: int, inner: Part) -> Rollouts:
    """`inner`'s rollouts with the policy of `lag` steps ago."""
    return model.as_of(step, lambda workers: inner(workers, task, step, size=size, seed=seed))


@needs("tokens", "said", "advantages", "old", "reference", model=TOKENS_TO_LOGITS)
@over_tokens
def two_sided_relative(
    model: nn.Module, batch: Rollouts, *, clip: float = 0.2, beta: float = 0.04, delta: float = 4.0
) -> PerExample:
    """GRPO's loss with a two-sided clip, as a mean over all tokens of the batch. -> (B,)."""
    new, lengths = log_probs(model, batch.tokens, batch.said.shape[1]), batch.said.sum(1)
    losses = two_sided(new, batch.old, batch.advantages[:, None], clip=clip, delta=delta)
    losses = ((losses + beta * k3(new, batch.reference)) * batch.said).sum(1) / lengths
    # token-level mean: each answer weighs as many tokens as it has
    return losses * (lengths / lengths.mean())


@paper(on=(grpo, shardcast, toploc), replaces=grpo, year=2025, arxiv="2505.07291", whole="gpt+grpo")
def prime_rl(recipe: Part, *, lag: int = 2, delta: float = 4.0) -> Part:
    """worker, with weights of step t - lag (SHARDCAST):
        questions = task.prompts(step, seed(node, step, count))
        answers = generate(questions); send answers, rewards and TOPLOC proofs
    trainer, at step t:
        refuse submissions with `faults`; advantages are relative to the group (GRPO)
        loss = -min(min(r, delta) A, clamp(r, 1 - clip, 1 + clip) A) + beta KL, mean over tokens
        step, and publish the weights
    """
    recipe = recipe.fill("objective", two_sided_relative, delta=delta)
    return recipe.wrap("model", Lagging, lag=lag).wrap("batches", late) if lag else recipe


def two_sided(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip: float = 0.2, delta: float = 4.0
) -> Float[Tensor, "..."]:
    """-min(min(r, delta) A, clamp(r, 1 - clip, 1 + clip) A): PPO's loss with a ratio of at most `delta`.

    Raises UserError where delta does not exceed 1 + clip.
    """
    if delta <= 1 + clip:
        raise UserError(f"delta must exceed 1 + clip = {1 + clip:g}, not {delta:g}: choose a larger delta")
    # min(r, delta): log r is capped at log delta before PPO's own clip
    return ppo(torch.minimum(log_probs, old.detach() + math.log(delta)), old, advantages, clip=clip)


class Submission(NamedTuple):
    """A worker's message: node, step, batch count, answers, rewards, and proofs of each answer."""

    node: int
    step: int
    count: int
    tokens: Tensor
    rewards: Tensor
    proofs: list[list[Proof]]

    @property
    def seed(self) -> int:
        """Fixed by node, step and count, so that no worker chooses its questions."""
        return seed_of(self.node, self.step, self.count)


def seed_of(node: int, step: int, count: int) -> int:
    """node * 2^40 + step * 2^20 + count, each of 20 bits. Raises UserError outside of that."""
    if not all(0 <= part < 2**20 for part in (node, step, count)):
        raise UserError(f"node {node}, step {step}, count {count} must be 0 to 2**20 - 1: choose smaller numbers")
    return (node * 2**20 + step) * 2**20 + count


@torch.no_grad()
def work(model: nn.Module, task: Any, *, node: int, step: int, count: int, size: int) -> Submission:
    """An honest worker's answers to its `size` questions, with rewards and proofs."""
    # the seed fixes questions and sampling, so a worker cannot choose easy ones
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
    """The reasons to refuse a submission; empty for an accepted one.

    model   the promised policy; proofs are compared with its hidden states
    rare    the probability of refusing tokens drawn from it, and the least probability of an end
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
    # one parallel pass gives probabilities and hidden states
    with evaluating(model), last_hidden(model) as states:
        chances = torch.log_softmax(model(tokens[:, :-1])[:, -task.answer :].float(), -1)
    ended = (tokens[:, length:] == task.end).int()
    said = ended.cumsum(1) - ended == 0  # tokens up to the first end
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
    """Log payoffs of two bets of 1 that the tokens come from a flatter, and from a sharper policy.

    chances  log-probabilities of each token's policy p; the bets are on p^1/2 and p^2, normalised, at fair odds

    For tokens drawn from p each bet has expectation 1, so a log above -log(rare) has probability at most `rare`
    (Markov).
    """
    # log(q / p) a token, with q ~ p^1/2 and q ~ p^2
    bets = [torch.log_softmax(power * chances, -1) - chances for power in (0.5, 2.0)]
    return [bet.gather(-1, tokens[:, None]).double().sum().item() for bet in bets]


def _begin_from_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Loads a plain model, or one with a reference, as inner model and as every past policy."""
    ours = [key for key in state if key.startswith(prefix)]
    if not any(key.startswith(f"{prefix}inner.") for key in ours):
        for key in ours:
            value, rest = state.pop(key), key.removeprefix(prefix)
            state[f"{prefix}inner.{rest}"] = value
            if not rest.startswith("reference."):
                for i in range(len(module.get_submodule("past")._modules)):
                    state[f"{prefix}past.{i}.{rest.removeprefix('policy.')}"] = value
