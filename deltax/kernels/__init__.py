"""Fast twins of reference functions: the same signature, the same values up to rounding.

A recipe names the reference; the machine picks the twin. `fastest` swaps them before a model is built.
"""

from collections.abc import Callable
from typing import Any

import torch

from deltax.kernels.attention import sdpa
from deltax.kernels.choice import auto, has_triton
from deltax.kernels.losses import chances_kept
from deltax.kernels.mlp import SlopeKept
from deltax.kernels.projections import SideBySide
from deltax.papers.language.attention.softmax_attention import Projections, attend
from deltax.parts.model.mlp import MLP
from deltax.parts.training.objectives import next_token
from deltax.recipe import Part, part, takes

# Reference -> its twin, and why it is taken.
_TWINS = {
    attend: (sdpa, "torch's fused kernel, kept weights where few look back, attend itself where a score is no bias"),
    Projections: (SideBySide, "one product for query, key and value"),
}
_ON_A_CPU = {
    MLP: (SlopeKept, "the slope of GELU is made on the way forward"),
    next_token: (chances_kept, "the chances are kept, so that the way back is one product"),
}
_ON_A_GPU = {attend: (auto, "chosen for each shape when it is called: see deltax.kernels.choice.picked")}
_IN_TRITON = {  # where the reference is -> module and function of its twin
    "deltax.papers.systems.attention_kernels.flash_attention.flash_attention": ("triton_attention", "flash"),
    "deltax.papers.systems.attention_kernels.sage_attention.sage_attention": ("triton_sage", "sage"),
    "deltax.papers.systems.attention_kernels.sage_attention_2.sage_attention_2": ("triton_sage", "sage_2"),
}


def fastest(recipe: Part, device: torch.device) -> Part:
    """The recipe with every reference kernel replaced by its fastest twin for the device."""

    def swap(_: str, old: Part) -> Part:
        twin, _why = _twin(old.make, device)
        kept = {word: value for word, value in old.given if word in takes(twin)} if twin else {}
        return part(twin, **kept) if twin else old

    return recipe.rewrite(swap)


def said(recipe: Part, device: torch.device) -> list[str]:
    """What `fastest` puts in place of what, and why: a line for each reference of the recipe that has a twin."""
    lines = {}
    for _, old in recipe.walk():
        if isinstance(old, Part) and (found := _twin(old.make, device))[0]:
            lines[f"{old.make.__name__} -> {found[0].__name__} on {device.type}: {found[1]}"] = None
    return list(lines)


def reference(recipe: Part) -> Part:
    """The recipe with every kernel that names a `reference` replaced by it: what the FLOPs of a model are counted on.

    Such a kernel computes the same function, but may skip, repeat or hide some of its products.
    """
    named = lambda old: getattr(old.make, "reference", None)
    return recipe.rewrite(lambda _, old: part(named(old)) if callable(named(old)) else old)


def _twin(make: Any, device: torch.device) -> tuple[Callable[..., Any] | None, str]:
    own = {"cpu": _ON_A_CPU, "cuda": _ON_A_GPU}.get(device.type, {})
    for table in (own, _TWINS):
        if make in table:
            return table[make]
    place = _IN_TRITON.get(f"{getattr(make, '__module__', '')}.{getattr(make, '__qualname__', '')}")
    if device.type == "cuda" and place and has_triton():
        import importlib

        return getattr(importlib.import_module(f"deltax.kernels.{place[0]}"), place[1]), "its Triton kernel"
    return None, ""
