import pytest
import torch
from torch import nn

from deltax import UserError, recipe
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.post_training.grpo import grpo, log_probs, rollouts
from deltax.papers.multimodal.loretta import through_the_link
from deltax.tasks.language.arithmetic import Arithmetic
from deltax.tasks.language.text import Text
from deltax.tasks.multimodal.linked_digits import VOCAB, LinkedDigits
from deltax.train.job import Job
from deltax.train.loop import build, train

SMALL = gpt.put("model.dim", 12).put("model.stack.depth", 1).put("task.held_out", 5000) + grpo(group=4, questions=3)


def model_of(recipe, seed=0):
    return build(recipe(), Arithmetic(), seed)


def same(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items()) and a.keys() == b.keys()


def test_gpt_on_text_is_moved_to_a_task_that_can_tell_right_from_wrong():
    assert gpt["task"].target is Text and SMALL["task"].target is Arithmetic
    kept = gpt.fill("task", Arithmetic, digits=1) + grpo
    assert kept["task.digits"] == 1


def test_rollouts_are_groups_of_answers_with_what_the_policy_thought_of_them():
    model, task = model_of(SMALL), Arithmetic()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.normal_(std=0.3)
    torch.manual_seed(1)
    found = rollouts(model, task, 2, size=12, seed=7, group=4)
    questions = found.tokens[:, : task.question]
    assert torch.equal(questions, task.prompts(2, size=3, seed=7).repeat_interleave(4, 0))
    torch.testing.assert_close(found.old, log_probs(model.policy, found.tokens, task.answer))
    torch.testing.assert_close(found.reference, log_probs(model.reference, found.tokens, task.answer))
    assert not torch.allclose(found.old, found.reference)
    for row, said in zip(found.tokens[:, task.question :].tolist(), found.said.tolist(), strict=True):
        length = row.index(task.end) + 1 if task.end in row else task.answer
        assert said == [1.0] * length + [0.0] * (task.answer - length)
    assert torch.equal(torch.cat([p.tokens for p in found.pieces(5)]), found.tokens)
    assert not any(tensor.requires_grad for tensor in found)


def test_the_reference_is_where_the_run_began_and_never_learns():
    plain = gpt.put("model.dim", 12).put("model.stack.depth", 1).fill("task", Arithmetic)
    start = model_of(plain, seed=3).state_dict()
    out = train(Job(SMALL, seed=0, steps=3), weights=start)
    assert same(out.model.reference.state_dict(), start)
    assert not same(out.model.policy.state_dict(), start)
    fresh = model_of(SMALL)
    assert same(fresh.reference.state_dict(), fresh.policy.state_dict())


def test_a_resumed_run_keeps_its_reference_and_ends_the_same(tmp_path):
    plain = gpt.put("model.dim", 12).put("model.stack.depth", 1).fill("task", Arithmetic)
    start, job = model_of(plain, seed=3).state_dict(), Job(SMALL, seed=0, steps=4)

    class Cut(Exception):
        pass

    def cut(progress):
        if progress.step == 3:
            raise Cut

    whole = train(job, weights=start)
    with pytest.raises(Cut):
        train(job, weights=start, save_to=tmp_path / "run", save_every=0.0, on_step=cut)
    resumed = train(job, weights=start, save_to=tmp_path / "run", save_every=0.0)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(resumed.model.reference.state_dict(), start)


@pytest.mark.parametrize(("size", "group"), [(10, 4), (4, 1)])
def test_a_batch_that_does_not_come_in_groups_is_told(size, group):
    with pytest.raises(UserError, match="does not come in groups"):
        rollouts(model_of(SMALL), Arithmetic(), 0, size=size, seed=0, group=group)


def test_a_task_without_a_reward_is_told():
    with pytest.raises(UserError, match="cannot tell a right answer"):
        rollouts(model_of(SMALL), object(), 0, size=8, seed=0, group=4)


@pytest.mark.parametrize(
    "title", ["gpt+dropout(p=0.5)+grpo(group=3, questions=2)", "gpt+dropout(p=0.5)+grpo(group=3, questions=2)+prime-rl"]
)
def test_rollouts_are_drawn_and_scored_in_evaluation_mode(title):
    """Beside dropout too the old log-probabilities are those that the answers were drawn by, each time the same; the
    model is left in training mode, in which its loss is computed."""
    tree = recipe(title, ["model.inner.stack.depth=1"] if "prime" not in title else ["model.inner.inner.stack.depth=1"])
    run, task = tree(), Arithmetic()
    model = build(run, task, 0)
    torch.manual_seed(0)
    batch = run.batches(model, task, 0, size=6, seed=0)
    assert all(module.training for module in model.modules())
    modes = [log_probs(model, batch.tokens, task.answer).detach()]
    model.eval()
    modes.append(log_probs(model, batch.tokens, task.answer).detach())
    torch.testing.assert_close(batch.old, modes[1])
    torch.testing.assert_close(batch.reference, modes[1])
    assert not torch.allclose(modes[0], modes[1])


def test_what_a_model_samples_for_training_is_sampled_in_evaluation_mode():
    """The other recipe that trains on its own samples, through a link."""
    seen = []

    class Watched(nn.Module):
        def forward(self, tokens, ctx=None):
            seen.append(self.training)
            return torch.zeros(*tokens.shape, VOCAB)

    model = Watched().train()
    pair = LinkedDigits().pairs(0, size=2, seed=0)[0]
    through_the_link(model, pair)
    assert seen and not any(seen) and model.training
