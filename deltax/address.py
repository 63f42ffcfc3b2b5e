"""The address of a part in stored recipes, and the way back from an address to the part.

An address is an area, a file and a name, without the folders between: "papers.dyt:DyT", "tasks.masks:MaskScenes",
"torch.nn:LayerNorm". A file can move to another folder of its area and stored recipes still open.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from deltax.errors import UserError, nearest

AREAS = ("parts", "papers", "tasks", "kernels")
"""The folders of deltax whose classes and functions a recipe is made of."""

MOVED: dict[str, str] = {
    "parts.nothing:Nothing": "parts.identity:Identity",
    "parts.linear:Glorot": "parts.linear:XavierLinear",
    "parts.linear:Out": "parts.linear:OutProj",
    "parts.linear:Matrix": "parts.linear:LinearNoBias",
    "parts.linear:OutMatrix": "parts.linear:OutProjNoBias",
    "parts.stack:straight": "parts.stack:sequential",
    "parts.stack:in_turn": "parts.stack:sequential_branches",
    "parts.stale:Stale": "parts.delayed_gradients:DelayedGradients",
    "parts.autoencoder:Open": "parts.autoencoder:NoBottleneck",
    "papers.mask2former:inside": "papers.mask2former:masked_attention",
    "papers.entropy_minimisation:sure": "papers.entropy_minimisation:entropy_loss",
    "papers.dropout:Thinned": "papers.dropout:BranchDropout",
    "papers.mae:fill_in": "papers.mae:reconstruct",
    "kernels.losses:chances_kept": "kernels.losses:saved_probabilities",
    "kernels.mlp:SlopeKept": "kernels.mlp:SavedGeluDerivative",
    "kernels.projections:SideBySide": "kernels.projections:FusedQKV",
}
"""Old address -> new address, for a definition that has changed file, area or name."""

_OPTIMIZER = {"rate": "lr", "decay": "weight_decay"}
ARGUMENTS: dict[str, dict[str, str]] = {
    "parts.optimizers:adamw": _OPTIMIZER,
    "parts.optimizers:sgd": {"rate": "lr"},
    "parts.optimizers:nesterov": {"rate": "lr"},
    "parts.run:Loop": {"clip": "max_grad_norm"},
    "papers.muon:muon_and_adamw": {**_OPTIMIZER, "spectral_rate": "spectral_lr"},
    "papers.async_nesterov_pp:nadam": _OPTIMIZER,
    "papers.async_local_sgd:DelayedNesterov": {"rate": "lr"},
    "papers.momentum_lookahead:LookAhead": {"rate": "lr"},
    "papers.nesterov_outer:outer_nesterov": {"rate": "lr"},
    "papers.nesterov_outer:outer_momentum": {"rate": "lr"},
    "papers.nesterov_outer:outer_adam": {"rate": "lr"},
    "papers.maskformer:mask_classification": {"compare_at": "matching_points", "learn_at": "loss_points"},
}
"""Address -> old name of an argument -> new name, for stored recipes from before a renaming."""

JOB_FIELDS = {"rate": "lr_scale"}
"""The same of the fields of a stored job."""

_ACTIVATIONS = """
celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu
softmin softplus softshrink softsign softmax tanh tanhshrink threshold
"""
FUNCTIONS = frozenset(_ACTIVATIONS.split())
"""What a stored recipe may name of torch.nn.functional."""

_HOUSE = Path(__file__).parent
_TORCH = ("torch.nn", "torch._C._nn")


def address(target: Callable[..., Any]) -> str:
    """Where `target` is defined. Outside deltax and torch.nn it is the module's whole name, which `find` refuses."""
    module, name = target.__module__ or "", target.__qualname__
    if _is_in(module, _TORCH):
        return f"torch.nn{'' if inspect.isclass(target) else '.functional'}:{name}"
    package, *folders = module.split(".")
    if package == "deltax" and len(folders) > 1 and folders[0] in AREAS:
        return f"{folders[0]}.{folders[-1]}:{name}"
    return f"{module}:{name}"


def find(text: Any) -> Callable[..., Any]:
    """The class or function at an address. Raises UserError for one that is not there, or is no part.

    What counts is the object: a name that a module of ours imported from elsewhere is refused. Addresses as they were
    before, with folders ("deltax.papers.language.dyt:DyT", "torch.nn.modules.batchnorm:BatchNorm2d"), are understood.
    """
    if not isinstance(text, str) or ":" not in text:
        raise UserError(f"a stored recipe names its parts as 'papers.dyt:DyT', not {text!r}")
    module, _, name = text.partition(":")
    if _is_in(module, _TORCH):
        return _in_torch(name)
    area, stem = _place(module)
    here, seen = f"{area}.{stem}:{name}", set()
    while here in MOVED and here not in seen:
        seen.add(here)
        here = MOVED[here]
    module, _, name = here.partition(":")
    return _in_torch(name) if _is_in(module, _TORCH) else _in_house(*_place(module), name)


def arguments(target: Callable[..., Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stored part by the names that its target has today."""
    renamed = ARGUMENTS.get(address(target), {})
    return {renamed.get(k, k): v for k, v in stored.items()}


@cache
def modules(area: str) -> dict[str, tuple[str, ...]]:
    """File stem -> the modules of an area that have it: one each, or an address would mean two."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((_HOUSE / area).rglob("*.py")):
        if path.stem != "__init__":
            name = ".".join(path.relative_to(_HOUSE.parent).with_suffix("").parts)
            found[path.stem] = (*found.get(path.stem, ()), name)
    return found


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _place(module: str) -> tuple[str, str]:
    """Area and stem, of an address with folders or without."""
    steps = module.removeprefix("deltax.").split(".")
    if steps[0] not in AREAS or len(steps) < 2:
        allowed = ", ".join(f"deltax.{area}" for area in AREAS)
        raise UserError(f"a stored recipe may name what {allowed} and torch.nn define, not {module!r}")
    return steps[0], steps[-1]


def _in_house(area: str, stem: str, name: str) -> Callable[..., Any]:
    known = modules(area)
    if stem not in known:
        raise UserError(f"there is no deltax/{area}/**/{stem}.py{nearest(stem, known)}: {_OTHER_VERSION}")
    if len(known[stem]) > 1:
        raise UserError(f"{area}.{stem} means several files, {' and '.join(known[stem])}: rename one")
    try:
        module = importlib.import_module(known[stem][0])
    except ImportError as error:
        raise UserError(f"{known[stem][0]} cannot be loaded ({error}); the stored recipe needs it") from None
    found: Any = module
    for step in name.split("."):
        found = None if step.startswith("_") else getattr(found, step, None)
    if found is None:
        ours = (k for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__)
        raise UserError(f"there is no {name!r} in {module.__name__}{nearest(name, ours)}: {_OTHER_VERSION}")
    if (getattr(found, "__module__", ""), getattr(found, "__qualname__", "")) != (module.__name__, name):
        raise UserError(f"a stored recipe may name only what deltax defines; {module.__name__} defines no {name!r}")
    if not (_is_part_class(found) or (inspect.isfunction(found) and "." not in name)):
        raise UserError(f"a stored recipe may name parts; {name!r} in {module.__name__} is none")
    return found


def _is_part_class(found: Any) -> bool:
    """Servers, threads and other classes that do something when they are made are no parts."""
    sources = {base.__module__.partition(".")[0] for base in inspect.getmro(found)} if inspect.isclass(found) else {""}
    return sources <= {"deltax", "torch", "builtins", "abc", "typing"}


def _in_torch(name: str) -> Callable[..., Any]:
    nn = importlib.import_module("torch.nn")
    found = getattr(nn, name, None)
    if inspect.isclass(found) and issubclass(found, nn.Module) and _is_in(found.__module__, ("torch.nn.modules",)):
        return found
    if name in FUNCTIONS:
        return getattr(nn.functional, name)
    raise UserError(f"a stored recipe may name modules and activations of torch.nn; {name!r} is neither")


_OTHER_VERSION = "another version of deltax stored this recipe"
