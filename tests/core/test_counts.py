"""A count that makes no sense is refused by its name and value, in every recipe and in the functions that take one."""

import pytest
import torch

from deltax import UserError, catalog, contract, recipe
from deltax.papers.generative.ddim import ddim, encode
from deltax.papers.generative.flow_matching import sample
from deltax.papers.language.position.rope import Rotary
from deltax.papers.language.post_training.grpo import advantages_of
from deltax.recipe import Part
from deltax.train.job import task_of
from deltax.train.loop import build

KNOWN = catalog.papers()


def counts():
    """(title, tree, path) of each whole number that a part of a recipe takes, once for each part and argument."""
    seen = set()
    for key, record in KNOWN.items():
        if record.kind == "procedure":
            continue
        title = key if record.kind == "recipe" else f"{catalog.shown_on(record, KNOWN)}+{key}"
        try:
            tree = recipe(title)
        except UserError:
            continue
        for path, value in tree.walk():
            above, _, name = path.rpartition(".")
            owner = tree[above] if above else tree
            if type(value) is int and value >= 0 and isinstance(owner, Part) and (owner.target, name) not in seen:
                seen.add((owner.target, name))
                yield title, tree, path, owner, name


def test_every_count_of_every_recipe_is_at_least_one_or_declared_to_be_off_at_zero():
    """Below its least it is refused when the run is made, with its name and value; at a zero that is allowed a model is
    built, whose loss is finite."""
    found = list(counts())
    assert len(found) > 100
    for title, tree, path, owner, name in found:
        parameter = contract._signature(owner.target)[name]
        may_be_off = name in getattr(owner.target, "can_be_zero", ()) or parameter.default == 0
        for value in (-1,) if may_be_off else (-1, 0):
            with pytest.raises(UserError, match=rf"{name}\b.*{value}"):
                run = tree.put(path, value)()
                build(run, task_of(tree), 0)  # a number that need not be whole is refused here
        if may_be_off and path.startswith("model") and name != "first":  # one map more needs anchors of its own
            off = tree.put(path, 0)
            run, task = off(), task_of(off)
            model = build(run, task, 0)
            loss = run.objective(model, run.batches(model, task, 0, size=16, seed=0))
            assert loss.isfinite().all(), (title, path)


NETWORK = lambda x, times: torch.tanh(x)


@pytest.mark.parametrize(
    ("call", "name", "wrong"),
    [
        (lambda n: ddim(NETWORK, torch.randn(2, 3), evaluations=n), "evaluations", (0, -1, 1001, 10**9)),
        (lambda n: encode(NETWORK, torch.randn(2, 3), evaluations=n), "evaluations", (0, -1, 1001, 10**9)),
        (lambda n: sample(NETWORK, torch.randn(2, 3), steps=n), "steps", (0, -1)),
        (lambda n: advantages_of(torch.randn(2, n)), "group", (0, 1)),
        (lambda n: Rotary(n), "head", (7, 1)),
    ],
)
def test_a_function_refuses_a_count_by_name(unchecked, call, name, wrong):
    for count in wrong:
        with pytest.raises(UserError, match=rf"{name}.*{count}"):
            call(count)


@pytest.mark.parametrize("count", [1, 7, 999, 1000])
def test_all_counts_of_steps_that_exist_give_finite_samples(count):
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    for found in (ddim(NETWORK, x, evaluations=count), encode(NETWORK, x, evaluations=count)):
        assert found.isfinite().all() and not torch.equal(found, x)


def test_rewards_equal_up_to_rounding_give_no_advantage():
    rewards = torch.tensor([[0.3, 0.1 + 0.2, 0.3, 0.3], [1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    same, other = advantages_of(rewards)
    assert not same.any()
    assert other.abs().min() > 0.8
    small = advantages_of(1e-9 * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(small, torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="not finite"):
            advantages_of(torch.tensor([[1.0, wrong, 0.0]]))
