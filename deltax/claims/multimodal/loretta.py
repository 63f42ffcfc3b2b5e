"""Claims of loretta: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import nn

from deltax import claim
from deltax.papers.language.models.gpt import gpt
from deltax.papers.multimodal.loretta import LINK, either_way, linked, span_moved, through_the_link
from deltax.parts.training.objectives import next_token
from deltax.tasks.language.text import IGNORED
from deltax.tasks.multimodal.linked_digits import (
    FILL,
    IMAGE,
    LENGTHS,
    MARK,
    PADDING,
    SOUND,
    START,
    LinkedDigits,
    padded,
    spell,
)


@claim
def a_pair_has_no_first():
    """A pair and the same pair swapped give the same sequences, both orders, each with equal chance."""
    (image, word), _ = LinkedDigits().pairs(0, size=400, seed=0)
    one = (image[0], image[1][:1].expand(200, -1)), (word[0], word[1][:1].expand(200, -1))
    torch.manual_seed(0)
    for pair in (one, one[::-1]):
        rows, counts = either_way(*pair).unique(dim=0, return_counts=True)
        assert torch.equal(rows, torch.cat([spell(*one), spell(*one[::-1])])[[0, 200]])
        assert (counts > 70).all()


@claim
def a_span_moved_is_not_lost():
    """Put back where MARK stands, what follows FILL makes the sequence that was; every token of it but the first is
    still to be said, once. With a share of nothing the sequences, and so the losses, are as they were."""
    torch.manual_seed(0)
    tokens = torch.randint(150, (64, 13))
    moved = span_moved(tokens, share=0.7)
    assert 20 < (moved == MARK).any(1).sum() < 64
    for was, row in zip(tokens.tolist(), moved.tolist(), strict=True):
        if MARK in row:
            at, end = row.index(MARK), row.index(FILL)
            row = [*row[:at], *row[end + 1 :], *row[at + 1 : end]]
        assert row[: len(was)] == was and set(row[len(was) :]) <= {PADDING}
    targets = padded([moved]).targets
    for was, row in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert sorted(t for t in row if 0 <= t < 150) == sorted(was[1:])
    model = _tiny()
    plain, off = padded([tokens]), padded([span_moved(tokens, share=0.0)])
    torch.testing.assert_close(next_token(model, off), next_token(model, plain))


@claim
def what_is_made_up_is_read_and_what_is_true_is_said():
    """Of a sequence through the link only the true block is a target, whole, the one that was given with the link; no
    gradient comes of the model's having made up what stands before."""
    model, pairs = _tiny(), LinkedDigits().pairs(3, size=10, seed=0)
    for pair, true, missing in zip(pairs, (IMAGE, SOUND), (SOUND, IMAGE), strict=True):
        torch.manual_seed(0)
        sequences, said = through_the_link(model, pair)
        blocks = dict(pair)
        assert torch.equal(torch.cat([s[:, -LENGTHS[true] :] for s in sequences]), blocks[true])
        assert torch.equal(sequences[1][:, LENGTHS[missing] + 1 :][:, 1 : LENGTHS[LINK] + 1], blocks[LINK][3:])
        assert all((s[:, 0] == START + missing).all() and not s.requires_grad for s in sequences)
        targets = padded(sequences, last=said).targets
        assert ((targets != IGNORED).sum(1) == LENGTHS[true]).all()
        assert torch.equal(targets[targets != IGNORED].view(-1, LENGTHS[true]), blocks[true])


@claim
def nothing_is_made_up_before_the_warm_up():
    """Up to the end of the warm-up the model is not asked, and batches hold tokens of the given pairs alone, the same
    as if nothing were ever made up; after it each second batch is made up."""
    task, model = LinkedDigits(), _tiny()
    asked = []
    model.register_forward_hook(lambda *_: asked.append(1))
    for step in range(6):
        batches = []
        for warmup in (4, 1000):
            torch.manual_seed(step)
            batches.append(linked(model, task, step, size=6, seed=0, warmup=warmup))
        assert torch.equal(batches[0].inputs, batches[1].inputs) == (step != 4)
        assert bool(asked) == (step >= 4)


@claim.measured(paper="ahead of GPT, BERT and CLIP on pairs never given together, on three sets (abstract, Figure 2)")
def it_says_what_it_never_saw_together(lab):
    """Asked for the sound of a held-out picture, which no training pair had together, it is right at least 20 points
    more often than the same GPT trained on the same pairs as they are."""
    plain, whole = (_runs(lab, name) for name in ("plain", "loretta"))
    return _gain(lab, plain, whole, 20.0)


@claim.measured(paper="the transitive step links what commutative modelling leaves apart (section 3, Figure 2)")
def the_link_is_needed(lab):
    """Without sequences through the link, all else equal, it is right at least 10 points less often."""
    without, whole = (_runs(lab, name) for name in ("without the link", "loretta"))
    return _gain(lab, without, whole, 10.0)


@claim.measured(paper="the transitive step links what commutative modelling leaves apart (section 3, Figure 2)")
def the_given_pairs_do_not_suffer(lab):
    """With sequences through the link it names held-out pictures as well as without, within 3 points."""
    way = "% error, image to word"
    without, whole = ([run.evaluation.metrics[way] for run in _runs(lab, n)] for n in ("without the link", "loretta"))
    lost = [b - a for a, b in zip(without, whole, strict=True)]
    return lab.at_most(lost, 3.0, unit="points", numbers={"% error without": without, "with": whole})


_SMALL = "gpt(dim=64, depth=2, heads=2)"


def _runs(lab, which: str) -> list[Any]:
    recipe = lab.recipe({"plain": _SMALL, "loretta": f"{_SMALL}+loretta"}.get(which, f"{_SMALL}+loretta(warmup=10000)"))
    recipe = recipe.fill("task", LinkedDigits).put("loop.batch", 48)
    return [lab.train(recipe, seed=seed, steps=600) for seed in lab.seeds(3)]


def _gain(lab, before: list[Any], after: list[Any], points: float):
    numbers = {
        f"{name}, {which}": [run.evaluation.metrics[name] for run in runs]
        for which, runs in (("before", before), ("after", after))
        for name in before[0].evaluation.metrics
    }
    gains = [a.score - b.score for a, b in zip(before, after, strict=True)]
    return lab.at_least(gains, points, unit="points", numbers=numbers)


def _tiny() -> nn.Module:
    """A small gpt in float64 with random weights over the tokens of the task."""
    torch.manual_seed(0)
    tree = gpt.put("model.dim", 12).put("model.stack.depth", 1)
    model = tree().build(LinkedDigits().task_spec).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
