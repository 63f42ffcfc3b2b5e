"""The parts that `surgery` puts in a living module: each takes the place of an old part, or stands around it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deltax.errors import UserError
from deltax.parts.attention.context import takes_context
from deltax.parts.rewriting import living
from deltax.parts.rewriting.living import Fused, FusedWeight, Site, Slice
from deltax.recipe import Part, part, takes


def replacement(site: Site, slots: dict[str, Part], module: nn.Module, shared: set[int]) -> nn.Module:
    """What stands at the site from now on."""
    old, alone = site.part, len(site.rows) == 1
    slot, new = next(iter(slots.items()))
    if slot == "activation":
        function = around(new, old)
        return Function(function() if isinstance(function.target, type) else function)
    like = next((t for m in (old, module) for t in m.parameters() if t.is_floating_point()), torch.empty(()))
    if slot in ("norm", "qk_norm"):
        return _made(new, old, like, shared, living.width(old))
    parts = {}
    for role, given in slots.items():
        view = old if alone and isinstance(old, nn.Linear) else Slice(old, "weight", "bias", site.rows[role])
        parts[role] = _made(given, view, like, shared, *view.weight.shape[::-1])
    in_place = alone and (isinstance(old, nn.Linear) or not wraps(new))
    return parts[slot] if in_place else Fused(old, site.rows, parts)


def parametrise(site: Site, slots: dict[str, Part]) -> nn.Module:
    parts = {}
    for slot, new in slots.items():
        view = Slice(site.part, site.raw, "bias" if site.raw == "weight" else "in_proj_bias", site.rows[slot])
        parts[slot] = _made(new, view, view.weight, set(), *view.weight.shape[::-1])
    parametrize.register_parametrization(site.part, site.raw, FusedWeight(site.rows, parts))
    return site.part


def as_it_is(*_: Any) -> None:
    """What stands in a slot of the probe: the module's own part."""


def shared_parameters(module: nn.Module) -> set[int]:
    """The ids of parameters that several modules hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for inner in module.modules():
        for p in inner._parameters.values():
            if p is not None:
                (twice if id(p) in seen else seen).add(id(p))
    return twice


def _made(new: Part, old: nn.Module, like: Tensor, shared: set[int], *sizes: int) -> nn.Module:
    """The new part, in the old one's place."""
    eps = next((e for name in ("eps", "variance_epsilon") if isinstance(e := getattr(old, name, None), float)), None)
    if eps is not None and "eps" in takes(new.target) and "eps" not in dict(new.kwargs):
        new = part(new, eps=eps)
    with torch.device(like.device):
        made = around(new, old)(*sizes)
    if not isinstance(made, nn.Module) or takes_context(made):
        raise UserError(f"{new} asks for more than a living module hands it: use it in a recipe")
    held = {id(t) for t in (*old.parameters(), *old.buffers())}
    for tensor in (*made.parameters(), *made.buffers()):
        if id(tensor) not in held and tensor.is_floating_point():
            tensor.data = tensor.data.to(like.dtype)
    if not wraps(new):
        _inherit(made, old, shared)
        _answer(made, old)
    return made.train(old.training)


@torch.no_grad()
def _inherit(made: nn.Module, old: nn.Module, shared: set[int]) -> None:
    """The weights that mean the same. Shared stays shared, frozen stays frozen, a norm without a gain learns none."""
    is_linear = isinstance(old, Slice | nn.Linear)
    weight = old.weight if is_linear else living.gain(old)
    own = dict(made.named_parameters(recurse=False))
    for name, value in (
        ("weight", weight),
        ("gain", None if is_linear else weight),
        ("bias", getattr(old, "bias", None)),
    ):
        if name in own and value is not None and value.shape == own[name].shape:
            if id(value) in shared:
                setattr(made, name, value)
            else:
                own[name].copy_(value)
        elif name == "bias" and name in own:
            own[name].zero_()
    stored = _parameters_of(old)
    if not is_linear and not stored:
        for name in [n for n in own if n in ("weight", "gain", "bias")]:
            del made._parameters[name]
            made.register_buffer(name, own[name].detach(), persistent=False)
    elif not any(p.requires_grad for p in stored):
        made.requires_grad_(False)
    lost = [p for p in stored if id(p) in shared and not any(p is q for q in made.parameters())]
    if lost and weight is not None and any(p.shape == getattr(made, n).shape for p in lost for n in own):
        raise UserError(
            f"a {type(old).__name__} shares its weight with another part, and {type(made).__name__} would not: "
            "give it a weight of its own first"
        )


def _parameters_of(old: nn.Module) -> list[nn.Parameter]:
    if isinstance(old, Slice):
        holder, name = old.holder()
        return [getattr(holder, name)]
    return list(old.parameters())


def _answer(made: nn.Module, old: nn.Module) -> None:
    """The numbers that the old part's neighbours may read of it, such as `eps`, where the new part has none."""
    for name, value in vars(old).items():
        if isinstance(value, bool | int | float | str | tuple) and not name.startswith("_") and not hasattr(made, name):
            setattr(made, name, value)
    if "bias" in old._parameters and not hasattr(made, "bias"):
        made.register_parameter("bias", None)


class Function(nn.Module):
    """An activation as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def wraps(new: Part) -> bool:
    return any(isinstance(v, Part) and v.target is as_it_is for _, v in new.walk())


def around(new: Part, old: Any) -> Part:
    """The part, with the living one where the probe's stood."""
    return new.rewrite(lambda _, p: Part(lambda *_: old) if p.target is as_it_is else p)


def leave_fused_paths(module: nn.Module) -> None:
    """torch's encoder layers read their children's weights in evaluation, unless the activation is unknown to them."""
    torch_parts = (nn.LayerNorm, nn.Linear)
    for inner in module.modules():
        if isinstance(inner, nn.TransformerEncoderLayer):
            children = (inner.norm1, inner.norm2, inner.linear1, inner.linear2)
            if isinstance(inner.activation, Function) or any(type(c) not in torch_parts for c in children):
                inner.activation_relu_or_gelu = 0
    for inner in module.modules():
        if isinstance(inner, nn.TransformerEncoder) and not inner.layers[0].activation_relu_or_gelu:
            inner.use_nested_tensor = False
