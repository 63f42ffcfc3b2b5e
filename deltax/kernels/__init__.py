"""Fast twins of reference functions: the same signature, the same values up to rounding.

A recipe names the reference; the machine picks the twin. `fastest` swaps them before a model is built.
"""

from collections.abc import Callable
from typing import Any

import torch

from deltax.kernels.twins import twins_of
from deltax.recipe import Part, part, takes


def fastest(recipe: Part, device: torch.device) -> Part:
    """The recipe with every reference kernel replaced by its fastest twin for the device."""

    def swap(_: str, old: Part) -> Part:
        twin, _why = _twin(old.target, device)
        kept = {word: value for word, value in old.kwargs if word in takes(twin)} if twin else {}
        return part(twin, **kept) if twin else old

    return recipe.rewrite(swap)


def said(recipe: Part, device: torch.device) -> list[str]:
    """What `fastest` puts in place of what, and why: a line for each reference of the recipe that has a twin."""
    lines = {}
    for _, old in recipe.walk():
        if isinstance(old, Part) and (found := _twin(old.target, device))[0]:
            lines[f"{old.target.__name__} -> {found[0].__name__} on {device.type}: {found[1]}"] = None
    return list(lines)


def reference(recipe: Part) -> Part:
    """The recipe with every kernel that names a `reference` replaced by it: what the FLOPs of a model are counted on.

    Such a kernel computes the same function, but may skip, repeat or hide some of its products.
    """
    named = lambda old: getattr(old.target, "reference", None)
    return recipe.rewrite(lambda _, old: part(named(old)) if callable(named(old)) else old)


def _twin(make: Callable[..., Any], device: torch.device) -> tuple[Callable[..., Any] | None, str]:
    """The fast twin that computes in place of `make` on a device, and why; None where there is none."""
    for twin in twins_of(make):
        if twin.runs_on(device.type):
            return twin.load(), twin.why
    return None, ""
