"""DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models.
Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo, 2024. arXiv:2402.03300

PPO, but no critic: an answer's advantage is its reward standardised within a group of answers to one question.

    for each question: draw G answers o_1 .. o_G from the policy, with rewards r_i
    A_i = (r_i - mean(r)) / std(r)
    ratio = policy / old policy, for each token of o_i
    L_i = mean over the tokens of o_i of: -min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) + beta k3
    update the policy along the gradient of the mean of L_i

The value network goes, and with it its memory and its training. The KL divergence to the initial model is a term of the
loss, not of the reward (Eq. 3). The paper draws 64 answers to each of 16 questions and updates once, at a learning rate
of 1e-6. Here the task's own reward replaces a reward model.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.papers.rl.ppo import ppo
from deltax.parts.numerics.counts import at_least
from deltax.parts.training.generate import generate
from deltax.parts.training.modes import evaluating
from deltax.parts.training.reference import Referenced
from deltax.parts.training.run import Loop
from deltax.shapes import PerExample, Tokens
from deltax.tasks.language.arithmetic import Arithmetic

PerToken = Float[Tensor, "B T"]


class Rollouts(NamedTuple):
    """Answers, and the quantities that an update needs of each.

    tokens      (B, P + T), questions and answers
    said        (B, T), the completion mask: 1 up to the end token, 0 after
    advantages  (B,), rewards standardised in each group
    old         (B, T), log-probabilities under the policy that drew the answers
    reference   (B, T), log-probabilities under the initial model
    """

    tokens: Tokens
    said: PerToken
    advantages: PerExample
    old: PerToken
    reference: PerToken

    def to(self, device: torch.device | str) -> "Rollouts":
        return Rollouts(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Rollouts]":
        """The batch in `count` pieces along its answers."""
        return [Rollouts(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """The number of tokens of each answer."""
        return self.said.sum(1)


@needs("tokens", "said", "advantages", "old", "reference", model=TOKENS_TO_LOGITS)
def group_relative(model: nn.Module, batch: Rollouts, *, clip: float = 0.2, beta: float = 0.04) -> PerExample:
    """PPO's loss plus beta k3, a mean over the tokens of each answer (Eq. 3, negated): (B,).

    The model keeps its mode. In a run that is training mode, as in trl: with dropout the ratio to the old policy is
    not 1 at the first step.
    """
    new = log_probs(model, batch.tokens, batch.said.shape[1])
    # (B, T); one advantage for all tokens of an answer
    losses = ppo(new, batch.old, batch.advantages[:, None], clip=clip) + beta * k3(new, batch.reference)
    return (losses * batch.said).sum(1) / batch.said.sum(1)  # 1 / |o_i|; Dr. GRPO drops this factor


@paper(on=ppo, year=2024, arxiv="2402.03300")
def grpo(recipe: Part, *, group: int = 16, questions: int = 16, clip: float = 0.2, beta: float = 0.04) -> Part:
    if not hasattr(recipe["task"].make, "reward"):
        recipe = recipe.fill("task", Arithmetic)
    recipe = recipe.wrap("model", Referenced).set(Loop, batch=group * questions)
    return recipe.fill("batches", rollouts, group=group).fill("objective", group_relative, clip=clip, beta=beta)


def advantages_of(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """(reward - mean) / std in each group of G answers, and 0 in a group of equal rewards (section 4.1.2).

    Rewards count as equal where they differ by rounding: by at most 16 eps times the largest. Raises UserError for a
    reward that is not finite, and for a group of one.
    """
    at_least(2, group=rewards.shape[1])
    if not rewards.isfinite().all():
        raise UserError(
            f"{int((~rewards.isfinite()).sum())} of {rewards.numel()} rewards are not finite: check the task's reward"
        )
    size = rewards.abs().amax(1, keepdim=True)
    same = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) <= 16 * torch.finfo(rewards.dtype).eps * size
    # trl adds 1e-4 to the deviation instead, which shrinks the advantages of nearly equal rewards
    spread = rewards.std(1, keepdim=True).masked_fill(same, 1.0)
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).masked_fill(same, 0.0)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """reference / policy - log(reference / policy) - 1 for each token (Eq. 4). All (B, T).

    It is at least 0, and an unbiased estimate of KL(policy || reference) for tokens drawn from the policy.
    """
    gap = reference - log_probs
    return torch.expm1(gap) - gap  # e^gap - gap - 1 without cancellation near 0


def log_probs(model: nn.Module, tokens: Tokens, length: int) -> Float[Tensor, "B {length}"]:
    """Log-probabilities of the last `length` tokens. Tokens (B, P + T) -> (B, T)."""
    # logits at t predict token t + 1
    logits = model(tokens[:, :-1])[:, -length:]  # (B, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, -length:, None])[..., 0]


@needs(task=("prompts", "reward", "answer", "end"), model=TOKENS_TO_LOGITS)
@torch.no_grad()
def rollouts(model: Referenced, task: Any, step: int, *, size: int, seed: int, group: int = 16) -> Rollouts:
    """`size` answers: size / group questions of the task, `group` answers each, at temperature 1.

    Answers and log-probabilities are computed in evaluation mode. Raises UserError where `size` is no multiple of
    `group`, or the task has no reward.
    """
    if group < 2 or size % group:
        raise UserError(
            f"a batch of {size} answers is no multiple of a group of {group} (at least 2): set loop.batch to a multiple"
        )
    if not hasattr(task, "reward"):
        raise UserError(
            f"{type(task).__name__} has no reward for an answer: choose a task with one, such as Arithmetic"
        )
    device = next(model.parameters()).device
    questions = task.prompts(step, size=size // group, seed=seed).to(device).repeat_interleave(group, 0)
    with evaluating(model):
        tokens = generate(model, questions, length=task.answer)
        old, reference = (log_probs(scored, tokens, task.answer) for scored in (model, model.reference))
    # the mask includes the first end token, which the policy has to learn, and nothing after it
    ended = (tokens[:, -task.answer :] == task.end).int()
    rewards = task.reward(tokens)
    return Rollouts(
        tokens,
        (ended.cumsum(1) - ended == 0).float(),
        advantages_of(rewards.view(-1, group)).flatten(),
        old,
        reference,
    )
