import numpy as np
import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.tasks.language.arithmetic import END, WORDS, Arithmetic


class Fixed(nn.Module):
    """Says whatever a function of the tokens says, as logits."""

    def __init__(self, say):
        super().__init__()
        self.anything, self.say = nn.Parameter(torch.zeros(1)), say

    def forward(self, tokens):
        return self.say(tokens)


def problems(task: Arithmetic, split: str) -> set[str]:
    return {task.decode(row[: task.question]) for batch in task.held_out_batches(64, split) for row in batch.inputs}


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_every_target_is_the_sum_and_an_end(digits):
    task = Arithmetic(digits=digits)
    inputs, targets = task.batch(3, size=200, seed=1)
    for row, target in zip(inputs, targets, strict=True):
        a, b = task.decode(row[: task.question - 1]).split("+")
        assert task.decode(target[target >= 0]) == f"{int(a) + int(b)};"
        assert (target[: task.question - 1] == -100).all() and row[task.question - 1] == WORDS.index("=")
        assert torch.equal(row[1:][target[:-1] >= 0], target[:-1][target[:-1] >= 0])


def test_held_out_problems_are_never_asked_in_training():
    for digits in (1, 2):
        task = Arithmetic(digits=digits, held_out=10_000)
        asked = {task.decode(row) for row in task.prompts(0, size=120_000, seed=0)}
        validation, sealed = problems(task, "validation"), problems(task, "sealed")
        assert not asked & validation and not asked & sealed and not validation & sealed
        assert len(asked | validation | sealed) == 10 ** (2 * digits)
        assert 0.7 < len(asked) / 10 ** (2 * digits) < 0.9


def test_questions_and_batches_are_pure_and_agree():
    task = Arithmetic()
    batch, prompts = task.batch(3, size=9, seed=5), task.prompts(3, size=9, seed=5)
    assert torch.equal(batch.inputs[:, : task.question], prompts)
    assert torch.equal(prompts, Arithmetic().prompts(3, size=9, seed=5))
    assert torch.equal(prompts[:4], task.prompts(3, size=4, seed=5))
    assert not torch.equal(prompts, task.prompts(4, size=9, seed=5))
    assert not torch.equal(prompts, task.prompts(3, size=9, seed=6))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("07+45=52;;", 1),
        ("07+45=52;9", 1),  # after the end nothing counts
        ("07+45=052;", 0),
        ("07+45=52", 0),  # no end
        ("07+45=5;2;", 0),
        ("07+45=53;;", 0),
        ("99+99=198;", 1),
        ("99+99=1988", 0),
        ("00+00=0;;;", 1),
        ("00+00=;;;;", 0),
        ("07+45=;52;", 0),
    ],
)
def test_reward_is_for_exactly_the_answer_and_an_end(text, reward):
    task = Arithmetic()
    assert task.reward(task.encode(text)[None]).tolist() == [reward]


def test_the_answers_of_a_batch_are_rewarded():
    task = Arithmetic()
    inputs, _ = task.batch(0, size=50, seed=0)
    tokens = torch.cat([inputs, torch.full((50, 1), END)], 1)
    assert task.reward(tokens).all()
    tokens[:, task.question] = (tokens[:, task.question] + 1) % 10
    assert not task.reward(tokens).any()


def test_sampled_accuracy_is_the_product_of_chances_and_greedy_the_likeliest_answer():
    task = Arithmetic(held_out=40)
    every = next(task.held_out_batches(40))
    right = lambda tokens: nn.functional.one_hot(every.targets.clamp(min=0), 13).float()
    half = lambda tokens: torch.log(0.5 * right(tokens) + 0.5 / 12 * (1 - right(tokens)))
    evaluation = task.evaluate(Fixed(half), None)
    length = (every.targets >= 0).sum(1).double()
    np.testing.assert_allclose(evaluation.values, (1 - 0.5**length).numpy(), rtol=1e-5)
    assert evaluation.metrics["accuracy"] == 1
    assert evaluation.score == pytest.approx(evaluation.values.mean())
    never = task.evaluate(Fixed(lambda tokens: -9 * right(tokens)), None)
    assert never.score == pytest.approx(1, abs=1e-3) and never.metrics["accuracy"] == 0


def test_evaluation_agrees_with_sampling():
    task = Arithmetic(digits=1)
    torch.manual_seed(0)
    table = torch.randn(13, 13)
    table[:, END] += 2
    evaluation = task.evaluate(Fixed(lambda tokens: table[tokens]), None)
    tokens = torch.cat([b.inputs[:, : task.question] for b in task.held_out_batches(64)]).repeat(4000, 1)
    for _ in range(task.answer):
        chances = torch.softmax(table[tokens[:, -1]], -1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1)], 1)
    rate = task.reward(tokens).mean().item()
    assert abs(rate - evaluation.metrics["sampled accuracy"]) < 4 * (rate / len(tokens)) ** 0.5 + 1e-4


def test_held_out_is_the_same_whatever_the_size():
    task = Arithmetic(held_out=70)
    a, b = (torch.cat([x.targets for x in task.held_out_batches(size, "sealed")]) for size in (1, 64))
    assert torch.equal(a, b) and len(a) == len(task.held_out_documents("sealed")) == 70


def test_the_fingerprint_follows_what_is_asked():
    prints = {Arithmetic(**kw).fingerprint for kw in ({}, {"digits": 1}, {"held_out": 50})}
    assert len(prints) == 3 and Arithmetic().fingerprint in prints


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Arithmetic(digits=0), "digits must be 1, 2 or 3"),
        (lambda: Arithmetic(held_out=0), "held_out must be a whole number"),
        (lambda: Arithmetic().held_out_documents("sealled"), "did you mean 'sealed'"),
        (lambda: Arithmetic().encode("1*2"), "is not in the vocabulary"),
    ],
)
def test_mistakes_are_told(make, says):
    with pytest.raises(UserError, match=says):
        make()
