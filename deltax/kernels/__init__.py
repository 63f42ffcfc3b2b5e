"""Fast twins of reference functions: the same signature, the same values up to rounding.

A recipe names the reference; the machine picks the twin. `fastest` swaps them before a model is built.
"""

import torch

from deltax.kernels.activation import gelu_kept
from deltax.kernels.attention import sdpa
from deltax.kernels.projections import SideBySide
from deltax.papers.language.softmax_attention import Projections, attend
from deltax.parts.mlp import gelu_tanh
from deltax.recipe import Part, part

_TWINS = {attend: sdpa, Projections: SideBySide}
_CPU_TWINS = {gelu_tanh: gelu_kept}


def fastest(recipe: Part, device: torch.device) -> Part:
    """The recipe with every reference kernel replaced by its fastest twin for the device."""
    twins = {**_TWINS, **_CPU_TWINS} if device.type == "cpu" else _TWINS
    return recipe.rewrite(lambda _, old: part(twins[old.make], **dict(old.given)) if old.make in twins else old)


def reference(recipe: Part) -> Part:
    """The recipe with every kernel that names a `reference` replaced by it: what the FLOPs of a model are counted on.

    Such a kernel computes the same function, but may skip, repeat or hide some of its products.
    """
    named = lambda old: getattr(old.make, "reference", None)
    return recipe.rewrite(lambda _, old: part(named(old)) if callable(named(old)) else old)
