"""Training Transitive and Commutative Multimodal Transformers with LoReTTa.
Tran, Cid, Lahiani, Theis, Peng, Klaiman, 2023. arXiv:2305.14243

ImageBind, but with one causal transformer over the tokens of all senses, which makes up what links two that were never
given together.

Given (A, B) and (B, C) alone, a GPT learns both orders of each pair, and at times a span is moved behind its sequence
so that it is told from both sides. Then B is asked for a C, and from this pseudo C the model is to say the true A:
data that was made up is only ever read, and what was measured is what is to be said. So A and C meet without having
been seen together. The paper links images, words and speech, cells and genes, games; its code was not released, and
when and how often it makes such pairs up is chosen here. The digits here have names that are spelt in tones.
"""

from itertools import chain
from typing import Any

import torch
from torch import nn

from deltax import Part, claim, paper
from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.papers.language.gpt import gpt
from deltax.papers.multimodal.imagebind import imagebind
from deltax.parts.generate import generate
from deltax.parts.modes import evaluating
from deltax.parts.objectives import next_token
from deltax.shapes import Tokens
from deltax.tasks.linked_digits import (
    FILL,
    IMAGE,
    LENGTHS,
    MARK,
    PADDING,
    SOUND,
    START,
    WORD,
    LinkedDigits,
    Rows,
    padded,
    spell,
)
from deltax.tasks.text import IGNORED, Batch

LINK = WORD
Pair = tuple[tuple[int, Rows], tuple[int, Rows]]


def either_way(first: tuple[int, Rows], second: tuple[int, Rows]) -> Rows:
    """The pair, for each example in the one order or the other with equal chance."""
    turned = torch.rand(len(first[1]), 1) < 0.5
    return torch.where(turned.to(first[1].device), spell(second, first), spell(first, second))


def span_moved(tokens: Tokens, *, share: float = 0.5) -> Rows:
    """For a `share` of the examples a span, up to half of the sequence, is moved behind it: MARK stands where it was,
    FILL before where it is. The others get padding. (B, T) -> (B, T + 2)."""
    count, length = tokens.shape
    rows = []
    for chosen in (torch.rand(count) < share).tolist():
        size = int(torch.randint(1, length // 2 + 1, ()))
        at = int(torch.randint(1, length - size + 1, ()))
        span = range(at, at + size)
        kept = [*range(at), length, *range(at + size, length), length + 1, *span]
        rows.append(kept if chosen else [*range(length), length + 2, length + 2])
    signs = torch.tensor([MARK, FILL, PADDING], device=tokens.device).expand(count, -1)
    return torch.cat([tokens, signs], 1).gather(1, torch.tensor(rows, device=tokens.device))


def through_the_link(model: nn.Module, pair: Pair) -> tuple[list[Rows], list[int]]:
    """Pseudo C of the pair's B, drawn from the model, then the true A: [C, A] for half of the examples and [C, B, A]
    for the others. Sequences, and how many tokens of each are to be said, those of A."""
    true, link = sorted(pair, key=lambda block: block[0] == LINK)
    missing = ({IMAGE, SOUND} - {true[0]}).pop()
    prompt = spell(link, (missing, link[1][:, :0]))
    with evaluating(model):
        pseudo = (missing, generate(model, prompt, length=LENGTHS[missing])[:, -LENGTHS[missing] :])
    half = (len(true[1]) + 1) // 2
    part_of = lambda block, which: (block[0], block[1][which])
    straight, along = slice(None, half), slice(half, None)
    sequences = [
        spell(part_of(pseudo, straight), part_of(true, straight)),
        spell(*(part_of(block, along) for block in (pseudo, link, true))),
    ]
    return sequences, [LENGTHS[true[0]]] * 2


@needs(task=("pairs",), model=TOKENS_TO_LOGITS)
def linked(
    model: nn.Module,
    task: Any,
    step: int,
    *,
    size: int,
    seed: int,
    warmup: int = 300,
    every: int = 2,
    share: float = 0.5,
) -> Batch:
    """Pairs in both orders, a share of them with a span moved; from step `warmup` on, each `every`-th batch is of pairs
    made up through the link instead."""
    device = next(model.parameters()).device
    pairs = [
        tuple((kind, tokens.to(device)) for kind, tokens in pair) for pair in task.pairs(step, size=size, seed=seed)
    ]
    if step < warmup or step % every:
        return padded([span_moved(either_way(*pair), share=share) for pair in pairs])
    sequences, said = zip(*(through_the_link(model, pair) for pair in pairs), strict=True)
    return padded(list(chain(*sequences)), last=list(chain(*said)))


linked.can_be_zero = ("warmup",)


@paper(on=(imagebind, gpt), year=2023, arxiv="2305.14243", whole="gpt")
def loretta(recipe: Part, *, warmup: int = 300, every: int = 2, share: float = 0.5) -> Part:
    recipe = recipe.fill("task", LinkedDigits)
    return recipe.fill("batches", linked, warmup=warmup, every=every, share=share)


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
    model = tree().build(LinkedDigits().facts).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
