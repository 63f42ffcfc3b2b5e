"""No next-token model reads its targets unless it declares that it does, and then its score carries a note."""

import pytest
import torch
from torch import nn

from deltax import UserError, catalog, contract, kernels, part, recipe
from deltax.lab.comparison import looks_ahead
from deltax.papers.language.models.gpt import gpt
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import everywhere
from deltax.parts.model.stack import Stack
from deltax.tasks.language.text import Text
from deltax.train import causality, islands, loop
from deltax.train.job import Job, task_of

KNOWN = catalog.papers()


class Shifted(nn.Module):
    """Each position's next, as much as a gate that starts at zero lets through. Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x, ctx: Context):
        return self.gate * x.roll(-1, 1)


class OnlyTheLast(nn.Module):
    """The last position's features, at the first position. Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x, ctx: Context):
        return torch.cat([x[:, -1:], x[:, 1:]], 1)


def causal_recipes():
    for key, record in KNOWN.items():
        if record.kind == "procedure":
            continue
        title = key if record.kind == "recipe" else f"{catalog.shown_on(record, KNOWN)}+{key}"
        try:
            tree = recipe(title)
        except UserError:
            continue
        if contract.interface(tree["model"]) in contract.CAUSAL:
            small = tree.set(Text, context=24) if tree["task"].target is Text else tree
            yield title, small.set(Stack, depth=1)


def test_every_next_token_recipe_is_causal_or_declares_that_it_is_not():
    """Checked with the declarations taken away: exactly the recipes that declare it look ahead."""
    found = {}
    for title, tree in causal_recipes():
        leaks = causality._leak(kernels.reference(tree["model"]), tree["task"], causality._Task(task_of(tree)))
        found[title] = bool(leaks)
        assert bool(leaks) == bool(contract.looks_ahead(tree)), (title, leaks)
    assert len(found) > 30 and any(found.values())


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (recipe("gpt+mlp-mixer(context=128)"), "mixer TokenMixing"),
        (recipe("gpt").set(gpt["model.stack.block.mixer"].target, mask=everywhere), "mixer Attention"),
        (recipe("gpt").fill("mixer", Shifted), "mixer Shifted"),
        (recipe("gpt").fill("mlp", part(OnlyTheLast)), "mlp OnlyTheLast"),
        (recipe("transformer").set(gpt["model.stack.block.mixer"].target, mask=everywhere), "mixer Attention"),
    ],
)
def test_a_model_that_reads_its_targets_is_refused_by_name(tree, words):
    with pytest.raises(UserError, match=f"^{tree.title.split('+')[0]}.* predicts tokens that it can read: the {words}"):
        loop.train(Job(tree, steps=1))


def test_islands_refuse_it_too():
    with pytest.raises(UserError, match="predicts tokens that it can read"):
        islands.train(Job(recipe("gpt+mlp-mixer(context=128)+diloco"), steps=1), None)


def test_the_check_is_made_once_and_moves_no_random_stream():
    causality._leak.cache_clear()
    state = torch.get_rng_state()
    run, task = gpt(), task_of(gpt)
    for _ in range(3):
        causality.check(run, task, "gpt")
    assert torch.equal(state, torch.get_rng_state())
    assert causality._leak.cache_info().misses == 1


def test_what_looks_ahead_by_design_is_noted_where_it_is_scored():
    for title in ("gpt+beyond-topk", "gpt+sage-attention", "gpt+sage-attention-2"):
        tree = recipe(title)
        causality.check(tree(), task_of(tree), title)
        [sentence] = looks_ahead(tree)
        assert "later" in sentence
    assert looks_ahead(recipe("gpt+topk-compression")) == []
