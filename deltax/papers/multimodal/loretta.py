"""Training Transitive and Commutative Multimodal Transformers with LoReTTa.
Tran, Cid, Lahiani, Theis, Peng, Klaiman, 2023. arXiv:2305.14243

ImageBind, but one causal transformer over all modalities' tokens, trained on generated links between unpaired
modalities.

    for each batch of pairs (A, B) or (B, C):
        shuffle the order of each pair; move a span behind some sequences      # commutative, causal masked modelling
        every second step after the warm-up:                                   # transitive
            sample a pseudo C from the model, given B
            train on [C, A] or [C, B, A] with loss on the true A only

Generated tokens are only inputs; targets are real data. So A and C are linked without having been seen together. The
paper has images, words and speech, cells and genes, and games; its code was not released, and when and how often pairs
are generated is chosen here. Here digits have names that are spelt in tones.
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


@needs(task=("pairs",), model=TOKENS_TO_LOGITS)
def linked(
    model: nn.Module, task: Any, step: int, *, size: int, seed: int, warmup: int = 300, every: int = 2,
    share: float = 0.5,
) -> Batch:  # fmt: skip
    """Pairs in both orders, a `share` of them with a moved span; from step `warmup` on, each `every`-th batch has
    generated pairs instead."""
    device = next(model.parameters()).device
    pairs = [
        tuple((kind, tokens.to(device)) for kind, tokens in pair) for pair in task.pairs(step, size=size, seed=seed)
    ]
    if step < warmup or step % every:
        return padded([span_moved(either_way(*pair), share=share) for pair in pairs])
    sequences, said = zip(*(through_the_link(model, pair) for pair in pairs), strict=True)
    return padded(list(chain(*sequences)), last=list(chain(*said)))


@paper(on=(imagebind, gpt), year=2023, arxiv="2305.14243", whole="gpt")
def loretta(recipe: Part, *, warmup: int = 300, every: int = 2, share: float = 0.5) -> Part:
    recipe = recipe.fill("task", LinkedDigits)
    return recipe.fill("batches", linked, warmup=warmup, every=every, share=share)


def either_way(first: tuple[int, Rows], second: tuple[int, Rows]) -> Rows:
    """Each pair in one of both orders, with equal probability."""
    # one draw per example
    turned = torch.rand(len(first[1]), 1) < 0.5
    return torch.where(turned.to(first[1].device), spell(second, first), spell(first, second))


def span_moved(tokens: Tokens, *, share: float = 0.5) -> Rows:
    """Causal masked modelling for a `share` of the examples: a span of up to half of the sequence moves behind it.

    MARK replaces the span, FILL precedes it at the end; other examples get padding. (B, T) -> (B, T + 2).
    """
    count, length = tokens.shape
    rows = []
    for chosen in (torch.rand(count) < share).tolist():
        size = int(torch.randint(1, length // 2 + 1, ()))
        at = int(torch.randint(1, length - size + 1, ()))
        span = range(at, at + size)
        kept = [*range(at), length, *range(at + size, length), length + 1, *span]
        rows.append(kept if chosen else [*range(length), length + 2, length + 2])  # (T + 2,)
    signs = torch.tensor([MARK, FILL, PADDING], device=tokens.device).expand(count, -1)
    return torch.cat([tokens, signs], 1).gather(1, torch.tensor(rows, device=tokens.device))


def through_the_link(model: nn.Module, pair: Pair) -> tuple[list[Rows], list[int]]:
    """A pseudo C sampled given the pair's B, then the true A: [C, A] for one half of the examples, [C, B, A] for the
    other.

    Returns the sequences, and for each its number of target tokens, those of A.
    """
    true, link = sorted(pair, key=lambda block: block[0] == LINK)
    # pairs are (image, word) and (word, sound): the word is the link
    missing = ({IMAGE, SOUND} - {true[0]}).pop()
    # B, then the start token of C
    prompt = spell(link, (missing, link[1][:, :0]))
    with evaluating(model):  # dropout off, no gradient
        pseudo = (missing, generate(model, prompt, length=LENGTHS[missing])[:, -LENGTHS[missing] :])
    half = (len(true[1]) + 1) // 2
    part_of = lambda block, which: (block[0], block[1][which])
    straight, along = slice(None, half), slice(half, None)
    sequences = [
        spell(part_of(pseudo, straight), part_of(true, straight)),
        spell(*(part_of(block, along) for block in (pseudo, link, true))),
    ]
    return sequences, [LENGTHS[true[0]]] * 2


linked.can_be_zero = ("warmup",)
