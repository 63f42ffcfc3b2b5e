"""What rides beside the stream."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltax.errors import UserError


class DecodingState:
    """What mixers remember from step to step, each under its own module, and how many positions they have seen."""

    def __init__(self) -> None:
        self.seen = 0
        self._memory: dict[nn.Module, Any] = {}
        self._ndims: dict[nn.Module, dict[str, int]] = {}

    def recall(self, module: nn.Module, default: Any = None) -> Any:
        return self._memory.get(module, default)

    def keep(self, module: nn.Module, memory: Any) -> None:
        self._memory[module] = memory

    def append(self, module: nn.Module, new: tuple[Tensor, ...], axes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Add to each of the module's tensors along its axis, and return all there is now."""
        past = self.recall(module)
        memory = tuple(torch.cat(pair, axis) for *pair, axis in zip(past, new, axes)) if past else new
        self.keep(module, memory)
        return memory

    def check(self, module: nn.Module, ctx: "Context") -> None:
        """Raise UserError where one piece of a sequence has positions or segments and another has none: queries of one
        piece are compared with keys of all."""
        given = {name: getattr(ctx, name) for name in ("positions", "segments")}
        ndims = {name: value.ndim for name, value in given.items() if value is not None}
        before = self._ndims.setdefault(module, ndims)
        if ndims != before:
            shown = lambda ndims: " and ".join(f"{name} of {n} axes" for name, n in ndims.items()) or "neither"
            raise UserError(
                f"the first piece under this decoding state had {shown(before)} in its context, this one "
                f"{shown(ndims)}: give positions and segments with every piece of a sequence, or with none"
            )

    def bytes(self) -> int:
        """The size of all tensors held."""
        return sum(t.numel() * t.element_size() for m in self._memory.values() for t in _tensors(m))


@dataclass(frozen=True)
class Context:
    """Everything a part may need beyond the stream.

    positions  (T,) or (B, T), where each element stands; None counts from what the state has seen
    segments   (B, T), elements attend inside their own segment only; padding is a segment of its own
    condition  (B, D), what the whole stream is conditioned on, a noise level or a class
    memory     (B, S, D), what cross-attention reads
    memory_segments  (B, S), the memory's segments, compared with `segments`
    memory_mask  (B, T, S), true where an element may look at the memory; None lets it look at all
    pos_embed  (B, T, D), where each element stands as a vector: added for queries and keys, not for values
    memory_pos_embed  (B, S, D), the same of the memory
    grid       (rows, columns) of a stream that is an image, row by row
    grids      the same of each of several images that a stream holds one after the other
    state      the decoding state, or None outside generation
    """

    positions: Tensor | None = None
    segments: Tensor | None = None
    condition: Tensor | None = None
    memory: Tensor | None = None
    memory_segments: Tensor | None = None
    memory_mask: Tensor | None = None
    pos_embed: Tensor | None = None
    memory_pos_embed: Tensor | None = None
    grid: tuple[int, int] | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    state: DecodingState | None = None

    def __post_init__(self) -> None:
        if self.memory_segments is not None and self.segments is None:
            raise UserError(
                "memory_segments are compared with segments, and there are none: give segments (B, T), zeros where the "
                "stream has no padding"
            )
        for name in ("memory_segments", "memory_seen", "memory_place"):
            if self.memory is None and getattr(self, name) is not None:
                raise UserError(f"{name} is of a memory, and there is none: give memory (B, S, D) with it")

    def refuse(self, part: nn.Module, *fields: str) -> None:
        """Raise UserError where one of these fields is given: `part` would leave it out of account."""
        for name in fields:
            if getattr(self, name) is not None:
                raise UserError(f"{type(part).__name__} {_UNUSED.get(name, f'does not read {name}')}: {_INSTEAD[name]}")

    def where(self, x: Tensor) -> Tensor:
        """The positions of x (B, T, ...): those given, or counted from what the state has seen."""
        if self.positions is not None:
            return self.positions
        start = self.state.seen if self.state else 0
        return torch.arange(start, start + x.shape[1], device=x.device)


_UNUSED = {"state": "cannot go on from a decoding state"}
_INSTEAD = {
    "positions": "leave out positions",
    "segments": "give examples of equal lengths, without padding, and no segments",
    "place": "leave out place",
    "memory_seen": "leave out memory_seen",
    "state": "read the whole sequence at every step, with no state in its context",
}


def with_pos_embed(x: Tensor, pos_embed: Tensor | None) -> Tensor:
    """x with the vectors of its places added, where it has any."""
    return x if pos_embed is None else x + pos_embed


def takes_context(module: nn.Module) -> bool:
    """Whether the part's forward has a `ctx`; a part that needs none of it takes none."""
    return "ctx" in inspect.signature(module.forward).parameters


def _tensors(memory: Any) -> list[Tensor]:
    if isinstance(memory, Tensor):
        return [memory]
    if isinstance(memory, dict):
        memory = memory.values()
    return [t for item in memory for t in _tensors(item)] if hasattr(memory, "__iter__") else []
