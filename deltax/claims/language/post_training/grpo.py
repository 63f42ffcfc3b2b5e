"""Claims of grpo: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.language.post_training.grpo import Rollouts, advantages_of, group_relative, grpo, k3, log_probs
from deltax.parts.training.reference import Referenced
from deltax.parts.training.run import Loop
from deltax.tasks.language.arithmetic import Arithmetic


@claim
def advantages_have_no_scale():
    """In each group advantages have mean 0 and standard deviation 1. Adding a constant to the rewards, or multiplying
    by a positive one, leaves them unchanged.
    """
    torch.manual_seed(0)
    rewards = torch.randn(5, 7, dtype=torch.float64)
    advantages = advantages_of(rewards)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages.std(1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(advantages_of(3.7 * rewards - 11), advantages)
    torch.testing.assert_close(advantages_of(-rewards), -advantages)


@claim
def k3_is_the_divergence():
    """The expectation of k3 under the policy equals KL(policy || reference), and k3 is at least 0 for every token."""
    torch.manual_seed(0)
    policy, reference = torch.log_softmax(2 * torch.randn(2, 9, 11, dtype=torch.float64), -1)
    each = k3(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum(-1)
    torch.testing.assert_close((policy.exp() * each).sum(-1), exact, rtol=1e-12, atol=1e-12)
    assert (each >= 0).all() and (policy - reference).min() < 0


@claim
def the_first_step_is_reinforce():
    """With policy, old policy and reference equal, the gradient equals REINFORCE's with rewards standardised in each
    group and log-likelihoods averaged over an answer's tokens.
    """
    model, batch = _tiny()
    weights = list(model.policy.parameters())
    ours = torch.autograd.grad(group_relative(model, batch).mean(), weights)
    said = (log_probs(model, batch.tokens, 4) * batch.said).sum(1) / batch.said.sum(1)
    plain = torch.autograd.grad(-(batch.advantages * said).mean(), weights)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)
    assert any(gradient.abs().max() > 1e-3 for gradient in ours)


@claim
def a_group_that_agrees_teaches_nothing():
    """Where all rewards of each group are equal, the gradient is zero without the KL term, and not zero with it."""
    model, batch = _tiny()
    batch = batch._replace(advantages=advantages_of(torch.full((2, 3), 0.1)).flatten())
    for parameter in model.policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = list(model.policy.parameters())
    free, held = (torch.autograd.grad(group_relative(model, batch, beta=b).mean(), weights) for b in (0.0, 0.04))
    assert not any(gradient.any() for gradient in free)
    assert any(gradient.abs().max() > 1e-6 for gradient in held)


@claim
def nothing_is_learnt_after_the_end():
    """Changing the tokens after the end of an answer changes neither the loss nor its gradient."""
    model, batch = _tiny()
    other = torch.where(batch.said.bool(), batch.tokens[:, -4:], torch.randint(12, (6, 4)))
    changed = batch._replace(tokens=torch.cat([batch.tokens[:, :-4], other], 1))
    assert not torch.equal(changed.tokens, batch.tokens)
    changed = changed._replace(old=log_probs(model, changed.tokens, 4).detach())
    weights = list(model.policy.parameters())
    results = [group_relative(model, b) for b in (batch, changed)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r.sum(), weights) for r in results))


@claim.parity(peer="trl GRPOTrainer")
def equals_trl():
    """With the same log-probabilities (policy, old policy, reference all different), loss and gradient equal trl's
    with loss_type "grpo". Advantages equal trl's to 1e-3: trl adds 1e-4 to the deviation.
    """
    from trl.trainer.utils import nanstd

    model, batch = _tiny()
    batch = batch._replace(old=batch.old + 0.3 * torch.randn(6, 4), reference=batch.reference + torch.randn(6, 4))
    theirs, metrics = trl_loss(model, batch, loss_type="grpo")
    losses = group_relative(model, batch).mean(), theirs
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    weights = list(model.policy.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss, weights) for loss in losses), rtol=1e-10, atol=1e-12)
    assert 0 < metrics["clip_ratio/region_mean"][0] < 1
    rewards = torch.rand(5, 7, dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(
        advantages_of(rewards), centred / (nanstd(rewards, dim=1)[:, None] + 1e-4), rtol=1e-3, atol=0
    )


def trl_loss(
    model: nn.Module, batch: Any, loss_type: str, delta: float | None = None
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss that trl computes of these rollouts of four tokens with beta 0.04, and its metrics."""
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import GRPOTrainer

    trainer = SimpleNamespace(  # what the loss reads of a trainer
        **{"loss_type": loss_type, "beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2},
        **{"top_entropy_quantile": 1.0, "importance_sampling_level": "token", "off_policy_mask_threshold": None},
        **{"use_vllm": False, "aux_loss_enabled": False, "_entropy_bonus_enabled": False},
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=model,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            log_probs(model, batch.tokens, 4),
            torch.zeros(len(batch.tokens), 4),
            None,
        ),
    )
    inputs = {
        "prompt_ids": batch.tokens[:, :-4],
        "prompt_mask": torch.ones_like(batch.tokens[:, :-4]),
        "completion_ids": batch.tokens[:, -4:],
        "completion_mask": batch.said,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference,
    }
    return GRPOTrainer._compute_loss(trainer, model, inputs), trainer._metrics["train"]


@claim.measured(paper="DeepSeekMath-Instruct 7B to RL: GSM8K 82.9 to 88.2, MATH 46.8 to 51.7 (Table 5)")
def reward_alone_teaches(lab):
    """After a short supervised start, 150 GRPO updates raise the sampled accuracy of a small gpt on held-out sums by
    at least 5 points, as much as in the paper.
    """
    small = lab.recipe("gpt(dim=64, depth=2, heads=2)").fill("task", Arithmetic).set(Loop, batch=128)
    lifts, numbers = [], {}
    for seed in lab.seeds(3):
        start = lab.train(small, seed=seed, steps=600)
        end = lab.train(small + grpo(questions=64), seed=seed, steps=150, rate=0.3, weights=start.model.state_dict())
        for name in ("sampled accuracy", "accuracy"):
            for when, run in (("before", start), ("after", end)):
                numbers.setdefault(f"{name} {when}", []).append(run.evaluation.metrics[name])
        lifts.append(start.score - end.score)
    return lab.at_least(lifts, 0.05, unit="of sampled answers", numbers=numbers)


def _tiny() -> tuple[Referenced, Rollouts]:
    """A small model in float64, and its answers to two made-up questions, three each, with random rewards."""
    from deltax.papers.language.models.gpt import gpt

    torch.manual_seed(0)
    tree = (gpt + grpo).put("model.inner.dim", 12).put("model.inner.stack.depth", 1)
    model = tree().build(Arithmetic().facts).double()
    for parameter in model.policy.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.reset_parameters()
    tokens = torch.randint(12, (6, 10))
    tokens[0, 7] = tokens[3, 8] = tokens[4, 9] = Arithmetic.end
    ended = (tokens[:, -4:] == Arithmetic.end).int()
    at = log_probs(model, tokens, 4).detach()
    advantages = advantages_of(torch.randn(2, 3, dtype=torch.float64)).flatten()
    return model, Rollouts(tokens, (ended.cumsum(1) - ended == 0).double(), advantages, at, at)
