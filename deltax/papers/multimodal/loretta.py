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

from deltax import Part, paper
from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.papers.language.models.gpt import gpt
from deltax.papers.multimodal.imagebind import imagebind
from deltax.parts.training.generate import generate
from deltax.parts.training.modes import evaluating
from deltax.shapes import Tokens
from deltax.tasks.language.text import Batch
from deltax.tasks.multimodal.linked_digits import (
    FILL,
    IMAGE,
    LENGTHS,
    MARK,
    PADDING,
    SOUND,
    WORD,
    LinkedDigits,
    Rows,
    padded,
    spell,
)

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
