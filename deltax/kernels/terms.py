"""Rules in the terms that a compiled kernel takes: a few numbers and tensors instead of functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from deltax.papers.language.position.alibi import Distance
from deltax.parts.attention.scores import Rules, causal, everywhere, unchanged, window
from deltax.recipe import Part, part


class Terms(NamedTuple):
    """Who sees whom, and how strongly.

    causal      a query sees no later position
    width       and itself with the `width` - 1 before it; 0 for all of them
    slope       (H,), the penalty on distance of each head (ALiBi), or None
    q_at, k_at  positions (T,) or (B, T) and (S,) or (B, S), or None where both count from zero
    segments    (B, T) and (B, S), or None
    """

    causal: bool
    width: int
    slope: Tensor | None
    q_at: Tensor | None
    k_at: Tensor | None
    segments: tuple[Tensor, Tensor] | None


def refusal(rules: Rules) -> str:
    """Why these rules cannot be said in terms; empty where they can."""
    if _function(rules.mask) not in (causal, everywhere, window):
        return f"the mask {_named(rules.mask)} is a function of its own"
    if _function(rules.score) is unchanged or type(rules.score) is Distance:
        trained = [p for p in (getattr(rules.score, "slope", None),) if p is not None and p.requires_grad]
        return "the slopes are trained" if trained else ""
    return f"the score {_named(rules.score)} is a function of its own"


def terms(rules: Rules, queries: int, keys: int, device: torch.device) -> Terms:
    """These rules for so many queries and keys. Only where `refusal` is empty."""
    mask = _function(rules.mask)
    width = (rules.mask if isinstance(rules.mask, Part) else part(window))["width"] if mask is window else 0
    at = (rules.q_at, rules.k_at)
    if any(x is not None for x in at):
        lengths = (queries, keys)
        at = tuple(torch.arange(n, device=device) if x is None else x for x, n in zip(at, lengths))
    both = rules.q_segments is not None and rules.k_segments is not None
    segments = (rules.q_segments, rules.k_segments) if both else None
    slope = rules.score.slope if type(rules.score) is Distance else None
    return Terms(mask is not everywhere, width, slope, *at, segments)


def _function(given: object) -> object:
    return given.target if isinstance(given, Part) else given


def _named(given: object) -> str:
    made = _function(given)
    return getattr(made, "__name__", type(made).__name__)
