"""DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models.
Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo, 2024. arXiv:2402.03300

PPO, but the critic is the group: several answers to one question are judged by their own mean and deviation.

A value network as large as the policy is gone, and with it what it had to learn. The KL divergence to where training
began is in the loss, not in the reward (Eq. 3). The paper draws 64 answers to each of 16 questions and updates once,
at rate 1e-6; a task that can tell right from wrong takes the place of its reward model.
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
    """Answers, and what a step needs to know of each.

    tokens      (B, P + T), questions and answers
    said        (B, T), 1 up to the end of the answer and 0 after
    advantages  (B,), how much better than its group each answer was
    old         (B, T), log-probabilities under the policy that answered
    reference   (B, T), log-probabilities under the model that the run began with
    """

    tokens: Tokens
    said: PerToken
    advantages: PerExample
    old: PerToken
    reference: PerToken

    def to(self, device: torch.device | str) -> "Rollouts":
        return Rollouts(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Rollouts]":
        """The batch in `count` pieces along its answers; their advantages are settled."""
        return [Rollouts(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """How many tokens each answer has."""
        return self.said.sum(1)


def advantages_of(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """(reward - mean) / standard deviation in each group of G answers, and 0 where all got the same (section 4.1.2).

    Rewards are the same where they differ by rounding only: by less than 16 units in the last place of the largest.
    Raises UserError for a reward that is not finite, and for a group of one.
    """
    at_least(2, group=rewards.shape[1])
    if not rewards.isfinite().all():
        raise UserError("a reward is not finite, so that its group has no mean; mend the reward")
    size = rewards.abs().amax(1, keepdim=True)
    same = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) <= 16 * torch.finfo(rewards.dtype).eps * size
    spread = rewards.std(1, keepdim=True).masked_fill(same, 1.0)
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).masked_fill(same, 0.0)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """reference / policy - log(reference / policy) - 1 for each token (Eq. 4): at least 0, and under the policy's own
    tokens the mean is KL(policy || reference)."""
    gap = reference - log_probs
    return torch.expm1(gap) - gap


def log_probs(model: nn.Module, tokens: Tokens, length: int) -> Float[Tensor, "B {length}"]:
    """Log-probabilities of the last `length` tokens. Tokens (B, P + T) -> (B, T)."""
    logits = model(tokens[:, :-1])[:, -length:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, -length:, None])[..., 0]


@needs(task=("prompts", "reward", "answer", "end"), model=TOKENS_TO_LOGITS)
@torch.no_grad()
def rollouts(model: Referenced, task: Any, step: int, *, size: int, seed: int, group: int = 16) -> Rollouts:
    """`size` answers of the model: size / group of the task's questions, each answered `group` times at temperature 1.

    Answers and both log-probabilities are the model's in evaluation mode.

    Raises UserError where `size` is no multiple of `group`, or the task cannot tell right from wrong.
    """
    if group < 2 or size % group:
        raise UserError(
            f"a batch of {size} answers does not come in groups of {group}: set loop.batch to a multiple of it"
        )
    if not hasattr(task, "reward"):
        raise UserError(
            f"{type(task).__name__} cannot tell a right answer from a wrong one; choose a task with a reward"
        )
    device = next(model.parameters()).device
    questions = task.prompts(step, size=size // group, seed=seed).to(device).repeat_interleave(group, 0)
    with evaluating(model):
        tokens = generate(model, questions, length=task.answer)
        old, reference = (log_probs(scored, tokens, task.answer) for scored in (model, model.reference))
    ended = (tokens[:, -task.answer :] == task.end).int()
    rewards = task.reward(tokens)
    return Rollouts(
        tokens,
        (ended.cumsum(1) - ended == 0).float(),
        advantages_of(rewards.view(-1, group)).flatten(),
        old,
        reference,
    )


@needs("tokens", "said", "advantages", "old", "reference", model=TOKENS_TO_LOGITS)
def group_relative(model: nn.Module, batch: Rollouts, *, clip: float = 0.2, beta: float = 0.04) -> PerExample:
    """PPO's loss of each token plus beta times its k3, a mean over the tokens of each answer (Eq. 3, negated).

    The mode is the model's own: in a run that is training mode, as in trl, so that with dropout the ratio to the old
    policy is not 1 at the first step.
    """
    new = log_probs(model, batch.tokens, batch.said.shape[1])
    losses = ppo(new, batch.old, batch.advantages[:, None], clip=clip) + beta * k3(new, batch.reference)
    return (losses * batch.said).sum(1) / batch.said.sum(1)


@paper(on=ppo, year=2024, arxiv="2402.03300")
def grpo(recipe: Part, *, group: int = 16, questions: int = 16, clip: float = 0.2, beta: float = 0.04) -> Part:
    if not hasattr(recipe["task"].make, "reward"):
        recipe = recipe.fill("task", Arithmetic)
    recipe = recipe.wrap("model", Referenced).set(Loop, batch=group * questions)
    return recipe.fill("batches", rollouts, group=group).fill("objective", group_relative, clip=clip, beta=beta)
