"""What happens to attention scores between the product and the softmax, in FlexAttention's terms.

A *score* part is called `score(scores, b, h, q, k)` and a *mask* part `mask(b, h, q, k)`, where b, h, q and k are
integer tensors that broadcast to (B, H, T, S): example, head, and the positions of query and key. One function so
written serves the reference, the tiles of a kernel and FlexAttention alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltax.errors import UserError
from deltax.recipe import Part, part
from deltax.shapes import Keys, Queries, Scores


def unchanged(scores: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The score that leaves scores as they are."""
    return scores


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Each position sees itself and the past."""
    return q >= k


def everywhere(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Each position sees all."""
    return torch.ones_like(q >= k)


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, width: int = 64) -> Tensor:
    """Each position sees itself and the `width` - 1 before it."""
    return (q >= k) & (q - k < width)


def among(seen: Tensor) -> Callable[..., Tensor]:
    """The mask by which each position sees what `seen` (B, T, S) says; all heads alike."""
    return lambda b, h, q, k: seen[b, q, k]


def of_heads(attention: Any, *, first: int) -> None:
    """Tell an attention's score and mask, from now on, that its heads are those from `first` on of a whole model."""
    if isinstance(attention.score, nn.Module):
        attention.score.forward = _shifted(attention.score.forward, first)
    elif not _same_for_all_heads(attention.score):
        attention.score = _shifted(attention.score, first)
    if not _same_for_all_heads(attention.mask):
        attention.mask = _shifted(attention.mask, first)


def _same_for_all_heads(rule: Any) -> bool:
    return isinstance(rule, Part) and rule.target in (unchanged, causal, everywhere, window)


def _shifted(rule: Any, first: int) -> Any:
    def told(*given: Tensor) -> Tensor:
        *scores, b, h, q, k = given
        return rule(*scores, b, h + first, q, k)

    return told


@dataclass(frozen=True)
class Rules:
    """Who sees whom, and how strongly: a score part, a mask part, and where queries and keys stand.

    q_at (T,) or (B, T) and k_at (S,) or (B, S) are positions; None counts from zero. Segments (B, T) and (B, S),
    where given, must be equal for a query to see a key. A query that sees no key gets zeros.
    """

    score: Any = field(default_factory=lambda: part(unchanged))
    mask: Any = field(default_factory=lambda: part(everywhere))
    q_at: Tensor | None = None
    k_at: Tensor | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.q_segments is None) != (self.k_segments is None):
            given, other = ("k", "q") if self.q_segments is None else ("q", "k")
            raise UserError(
                f"segments of queries and keys are compared, and only {given}_segments are given: "
                f"give {other}_segments too, zeros where all are of one segment"
            )

    def __call__(
        self, scores: Scores, rows: slice = slice(None), columns: slice = slice(None), heads: slice = slice(None)
    ) -> Scores:
        """Scores of these rows, columns and heads, with -inf where a query must not look.

        The slices are into all rows, columns and heads; `scores` holds that tile alone.
        """
        where = self._where(scores.shape, scores.device, rows, columns, heads)
        scores = self.score(scores, *where)
        return scores if self.is_everywhere else scores.masked_fill(~self._seen(where, rows, columns), -torch.inf)

    def allowed(self, q: Queries, k: Keys, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Boolean, broadcastable to (B, H, T, S) or to the tile of these rows and columns: where a query may look.

        Only the shapes of all queries and keys are read, so a kernel can ask before it loads a tile.
        """
        t, s = len(range(*rows.indices(q.shape[1]))), len(range(*columns.indices(k.shape[1])))
        where = self._where((q.shape[0], q.shape[2], t, s), q.device, rows, columns, slice(None))
        return self._seen(where, rows, columns)

    def of_queries(self, rows: slice, device: torch.device) -> "Rules":
        """The same rules where the queries of these rows are all there are; keys stay as they were."""
        at = torch.arange(rows.start, rows.stop, device=device) if self.q_at is None else self.q_at[..., rows]
        segments = None if self.q_segments is None else self.q_segments[:, rows]
        return replace(self, q_at=at, q_segments=segments)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """Parameters of a score that is a module, by name: a kernel with its own backward pass owes them a gradient."""
        named = self.score.named_parameters() if isinstance(self.score, nn.Module) else ()
        return {name: p for name, p in named if p.requires_grad}

    def holding(self, learned: Sequence[Tensor]) -> "Rules":
        """The same rules with other tensors, in the order of `learned`, for what the score has learned."""
        if not learned:
            return self
        named = dict(zip(self.learned, learned, strict=True))
        return replace(self, score=lambda *scored: functional_call(self.score, named, scored))

    @property
    def is_plain(self) -> bool:
        """No score, no segments, positions from zero: fused kernels need be told no more than the mask."""
        counted = self.q_at is None and self.k_at is None
        return counted and _is(self.score, unchanged) and self.q_segments is None

    @property
    def is_causal(self) -> bool:
        return _is(self.mask, causal)

    @property
    def is_everywhere(self) -> bool:
        return _is(self.mask, everywhere) and self.q_segments is None

    @property
    def sees_itself(self) -> bool:
        """Of as many queries as keys, each sees at least the key that stands where it does: no row is blind."""
        paired = self.q_at is self.k_at and self.q_segments is self.k_segments
        return paired and _same_for_all_heads(self.mask)

    @property
    def is_per_example(self) -> bool:
        """The rules differ from example to example."""
        each = [at for at in (self.q_at, self.k_at) if at is not None and at.ndim == 2]
        return bool(each) or self.q_segments is not None

    @property
    def is_additive(self) -> bool:
        """The score adds what does not depend on the score: it can be handed over as a bias."""
        return getattr(self.score, "additive", False) or _is(self.score, unchanged)

    def _where(
        self, shape: Sequence[int], device: torch.device, rows: slice, columns: slice, heads: slice
    ) -> tuple[Tensor, ...]:
        batch, count, t, s = shape
        h = torch.arange((heads.start or 0), (heads.start or 0) + count, device=device)[:, None, None]
        return (
            torch.arange(batch, device=device)[:, None, None, None],
            h,
            _positions(self.q_at, rows, t, device)[..., :, None],
            _positions(self.k_at, columns, s, device)[..., None, :],
        )

    def _seen(self, where: tuple[Tensor, ...], rows: slice, columns: slice) -> Tensor:
        seen = self.mask(*where)
        if self.q_segments is not None:
            seen = seen & (self.q_segments[:, None, rows, None] == self.k_segments[:, None, None, columns])
        return seen


def _is(given: Any, function: Any) -> bool:
    return given is function or (isinstance(given, Part) and given.target is function)


def _positions(at: Tensor | None, of: slice, length: int, device: torch.device) -> Tensor:
    if at is None:
        start = of.start or 0
        return torch.arange(start, start + length, device=device)
    at = at[..., of]
    return at[:, None] if at.ndim == 2 else at
