"""A delta on a living module: what it does to the slots of a recipe, done to the parts that somebody else wrote.

The delta is run on a probe, a tree with every slot. What it left in the drop-in slots is then put where the module has
parts of that role.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deltax.errors import UserError
from deltax.parts import living
from deltax.parts.context import takes_context
from deltax.parts.living import Fused, FusedWeight, Site, Slice
from deltax.recipe import Part, part, takes
from deltax.slots import SLOTS


def apply(delta: Callable[[Part], Part], module: nn.Module) -> nn.Module:
    """Put what the delta puts in drop-in slots where the module has parts of that role, and return it.

    Drop-in slots are norm, qk_norm, query, key, value, out, up, gate, down and activation, and `model`, where the delta
    wraps it: that is the module itself. A new part takes the width, dtype, device and mode of the old one, a norm's
    eps where the delta leaves it open, and the weights that mean the same: a gain is a gain, a bias is a bias. A wrap
    holds the old part, as its `inner`. All else stays the same objects. The module is changed in place; where it is
    itself such a part, the new part is returned.

    Changes to other slots are left out, with a warning. Raises UserError where the delta touches no drop-in slot, or
    where the module has no such part.
    """
    title = getattr(delta, "title", None) or getattr(delta, "__name__", "this change")
    if not isinstance(module, nn.Module):
        raise UserError(f"{title} is applied to a torch.nn.Module, not to a {type(module).__name__}")
    changes = _changes(delta, title)
    new = {slot: changes.pop(slot) for slot in living.LOOKED_FOR if slot in changes}
    whole = changes.pop("model") if "model" in changes and _wraps(changes["model"]) else None
    if not new and whole is None:
        raise UserError(f"{title} is no drop-in part: use it in a recipe, as in 'gpt+{title}'")
    if new:
        module = _operate(module, new, title)
    if changes:
        parts = ", ".join(f"{slot} ({getattr(p.make, '__name__', p)})" for slot, p in changes.items())
        _warn(f"{title} also changes {parts}, which is left out: that is no drop-in part")
    return module if whole is None else _around(whole, module)()


def unwrap(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Put back what every wrap of this class holds, and return the module. The inverse of applying the wrap."""
    shared = [p for m in module.modules() if isinstance(m, Fused | FusedWeight) for p in m.parts.values()]
    for owner in list(module.modules()):
        for name, chain in list(getattr(owner, "parametrizations", {}).items()):
            if isinstance(chain[0], FusedWeight) and _forget(chain[0], kind):
                _own_class(owner)
                parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    for path, old in reversed(list(module.named_modules(remove_duplicate=False))):
        alone = isinstance(old, kind) and not any(old is p for p in shared)
        if alone or (isinstance(old, Fused) and _forget(old, kind)):
            module = _put(module, path, old.inner)
    return module


def _living(**slots: Part) -> None:
    """The root of the probe."""


def _as_it_is(*_: Any) -> None:
    """What stands in a slot of the probe: the module's own part."""


def _changes(delta: Callable[[Part], Part], title: str) -> dict[str, Part]:
    """The slots that the delta fills or wraps, with what it puts there."""
    probe = part(_living, **dict.fromkeys((*living.LOOKED_FOR, *SLOTS), part(_as_it_is)))
    refusal = UserError(f"{title} is no drop-in part: use it in a recipe")
    if getattr(delta, "kind", "delta") != "delta":
        raise refusal
    try:
        after = delta(probe)
    except UserError:
        raise refusal from None
    return {slot: new for slot, new in after.given if new != part(_as_it_is)}


def _operate(module: nn.Module, new: dict[str, Part], title: str) -> nn.Module:
    sites = list(living.find(module))
    unknown = [site.name for site in sites if site.rows is None]
    sites = [site for site in sites if site.rows and set(site.rows) & set(new)]
    made: dict[tuple[int, str | None], Any] = {}
    refused = []
    for site in sites:
        slots = {slot: new[slot] for slot in site.rows if slot in new}
        key = (id(site.part), site.raw)
        if site.raw and not all(_wraps(p) and hasattr(p.make, "merged") for p in slots.values()):
            refused.append(f"{site.name}.{site.raw}")
        elif site.raw and key not in made:
            made[key] = _parametrise(site, slots)
        elif not site.raw:
            made[key] = made[key] if key in made else _replacement(site, slots, module)
            if site.owner is None:
                return made[key]
            setattr(site.owner, site.name, made[key])
    _leave_fused_paths(module)
    if not made:
        looked = "; ".join(f"{slot}: {living.LOOKED_FOR[slot]}" for slot in new)
        found = f" ({', '.join(unknown + refused)} cannot be taken apart)" if unknown + refused else ""
        raise UserError(f"{title} looks for parts that {type(module).__name__} does not have{found}; {looked}")
    if any(slot in ("query", "key", "value") for slot in new) and unknown + refused:
        left = ", ".join(dict.fromkeys(unknown + refused))
        _warn(f"{title} leaves {left} as it is: it cannot be taken apart")
    return module


def _replacement(site: Site, slots: dict[str, Part], module: nn.Module) -> nn.Module:
    """What stands at the site from now on."""
    old, alone = site.part, len(site.rows) == 1
    slot, new = next(iter(slots.items()))
    if slot == "activation":
        function = _around(new, old)
        return _Function(function() if isinstance(function.make, type) else function)
    like = next((t for m in (old, module) for t in m.parameters() if t.is_floating_point()), torch.empty(()))
    if slot in ("norm", "qk_norm"):
        return _made(new, old, like, living.width(old))
    parts = {}
    for role, given in slots.items():
        view = old if alone and isinstance(old, nn.Linear) else Slice(old, "weight", "bias", site.rows[role])
        parts[role] = _made(given, view, like, *view.weight.shape[::-1])
    in_place = alone and (isinstance(old, nn.Linear) or not _wraps(new))
    return parts[slot] if in_place else Fused(old, site.rows, parts)


def _parametrise(site: Site, slots: dict[str, Part]) -> nn.Module:
    parts = {}
    for slot, new in slots.items():
        view = Slice(site.part, site.raw, "in_proj_bias", site.rows[slot])
        parts[slot] = _made(new, view, view.weight, *view.weight.shape[::-1])
    parametrize.register_parametrization(site.part, site.raw, FusedWeight(site.rows, parts))
    return site.part


def _made(new: Part, old: nn.Module, like: Tensor, *sizes: int) -> nn.Module:
    """The new part, in the old one's place."""
    eps = next((e for name in ("eps", "variance_epsilon") if isinstance(e := getattr(old, name, None), float)), None)
    if eps is not None and "eps" in takes(new.make) and "eps" not in dict(new.given):
        new = part(new, eps=eps)
    with torch.device(like.device):
        made = _around(new, old)(*sizes)
    if not isinstance(made, nn.Module) or takes_context(made):
        raise UserError(f"{new} asks for more than a living module hands it: use it in a recipe")
    held = {id(t) for t in (*old.parameters(), *old.buffers())}
    for tensor in (*made.parameters(), *made.buffers()):
        if id(tensor) not in held and tensor.is_floating_point():
            tensor.data = tensor.data.to(like.dtype)
    if not _wraps(new):
        _inherit(made, old)
    return made.train(old.training)


@torch.no_grad()
def _inherit(made: nn.Module, old: nn.Module) -> None:
    is_linear = isinstance(old, Slice | nn.Linear)
    weight = old.weight if is_linear else living.gain(old)
    own = dict(made.named_parameters(recurse=False))
    for name, value in (
        ("weight", weight),
        ("gain", None if is_linear else weight),
        ("bias", getattr(old, "bias", None)),
    ):
        if name in own and value is not None and value.shape == own[name].shape:
            own[name].copy_(value)
        elif name == "bias" and name in own:
            own[name].zero_()


class _Function(nn.Module):
    """An activation as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _wraps(new: Part) -> bool:
    return any(isinstance(v, Part) and v.make is _as_it_is for _, v in new.walk())


def _around(new: Part, old: Any) -> Part:
    """The part, with the living one where the probe's stood."""
    return new.rewrite(lambda _, p: Part(lambda *_: old) if p.make is _as_it_is else p)


def _forget(fused: Fused | FusedWeight, kind: type[nn.Module]) -> bool:
    """Take the parts of this class out; whether there were some, and none is left."""
    gone = [role for role, p in fused.parts.items() if isinstance(p, kind)]
    for role in gone:
        del fused.parts[role]
    return bool(gone) and not fused.parts


def _warn(message: str) -> None:
    """A warning at the line that called Δx."""
    frame, level, ours = sys._getframe(), 1, 1
    while frame is not None:
        ours = level if frame.f_globals.get("__name__", "").startswith("deltax.") else ours
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=ours + 1)


def _own_class(owner: nn.Module) -> None:
    """A parametrised module's copies share its class, and torch takes the parameter's property out of it."""
    old = type(owner)
    words = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(old.__name__, old.__bases__, words)


def _put(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    above, _, name = path.rpartition(".")
    if not path:
        return new
    setattr(module.get_submodule(above), name, new)
    return module


def _leave_fused_paths(module: nn.Module) -> None:
    """torch's encoder layers read their children's weights in evaluation, unless the activation is unknown to them."""
    torch_parts = (nn.LayerNorm, nn.Linear)
    for inner in module.modules():
        if isinstance(inner, nn.TransformerEncoderLayer):
            children = (inner.norm1, inner.norm2, inner.linear1, inner.linear2)
            if isinstance(inner.activation, _Function) or any(type(c) not in torch_parts for c in children):
                inner.activation_relu_or_gelu = 0
    for inner in module.modules():
        if isinstance(inner, nn.TransformerEncoder) and not inner.layers[0].activation_relu_or_gelu:
            inner.use_nested_tensor = False
