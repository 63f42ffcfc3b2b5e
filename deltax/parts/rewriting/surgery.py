"""A delta on a living module: what it does to the slots of a recipe, done to the parts that somebody else wrote.

The delta is run on a probe, a tree with every slot. What it left in the drop-in slots is then put where the module has
parts of that role. Forward passes before and after check that the new parts act, and as they should.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deltax.errors import UserError, nearest
from deltax.parts.rewriting import living, probing, replacing
from deltax.parts.rewriting.living import Fused, FusedWeight, Site, Slice
from deltax.recipe import Part, part
from deltax.slots import SLOTS

Selection = str | int | Iterable[str | int] | None

_WRAPPED = {
    "DistributedDataParallel": "apply it to the model first, then wrap it: DistributedDataParallel(Y.apply(model))",
    "DataParallel": "apply it to the model first, then wrap it: DataParallel(Y.apply(model))",
    "FullyShardedDataParallel": "apply it to the model first, then shard it",
    "FSDPModule": "apply it to the model first, then call fully_shard",
    "OptimizedModule": "apply it to the model first, then compile it: torch.compile(Y.apply(model))",
    "ScriptModule": "apply it to the model first, then script it",
    "GraphModule": "apply it to the module that was traced",
}


@dataclass(frozen=True)
class Applied:
    """What `Y.apply(model)` did.

    replaced   (path, class of the old part, class of the new part) of each part
    left       (path, reason) of each part of these roles that stayed as it was
    unchecked  the parts that no forward pass of the probe reached
    """

    title: str
    replaced: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str], ...] = ()
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {path or 'the module itself'}: {old} -> {new}" for path, old, new in self.replaced]
        lines += [f"  {path}: left, {reason}" for path, reason in self.left]
        lines += [f"  {path}: not reached by the probe, unchecked" for path in self.unchecked]
        return "\n".join(lines)


def applied(module: nn.Module) -> tuple[Applied, ...]:
    """What was applied to this module, in order, with what was replaced and what was left."""
    return tuple(getattr(module, _RECORD, ()))


def apply(
    delta: Callable[[Part], Part],
    module: nn.Module,
    *,
    where: Selection = None,
    skip: Selection = None,
    example: Any = None,
) -> nn.Module:
    """Put what the delta puts in drop-in slots where the module has parts of that role, and return it.

    Drop-in slots are norm, qk_norm, query, key, value, out, up, gate, down and activation, and `model`, where the delta
    wraps it: that is the module itself. A new part takes the width, dtype, device and mode of the old one, a norm's
    eps where the delta leaves it open, and the weights that mean the same: a gain is a gain, a bias is a bias. A wrap
    holds the old part, as its `inner`. All else stays the same objects. The module is changed in place; where it is
    itself such a part, the new part is returned. `deltax.applied(module)` lists what was replaced and what was left.

    where, skip  names with wildcards ("decoder.*.norm"), slots ("query") or layer indices; one of them or several
    example      an input of the module, for the probe: a tensor, a tuple of arguments, or a dict

    Changes to other slots are left out, with a warning, where the delta can do without them. One forward pass in
    training and one in evaluation check that the new parts are used. Raises UserError where the delta touches no
    drop-in slot, where the module lacks such a part, and where a check fails; the module is then left as it was.
    """
    title = getattr(delta, "title", None) or getattr(delta, "__name__", "this change")
    if not isinstance(module, nn.Module):
        raise UserError(f"{title} is applied to a torch.nn.Module, not to a {type(module).__name__}")
    new, whole, changes = _drop_in(delta, title)
    _refuse_wrapped(module, title)
    record = Applied(title, ())
    with _whole_or_not_at_all(module, title):
        given = probing.find(module, example)
        if new:
            module, record = _Surgery(module, new, title, given).done(where, skip)
        module = module if whole is None else replacing.around(whole, module)()
    setattr(module, _RECORD, (*applied(module), record))
    if changes:
        parts = ", ".join(f"{slot} ({getattr(p.target, '__name__', p)})" for slot, p in changes.items())
        _warn(f"{title} also changes {parts}, which is left out: that is no drop-in part")
    unknown = [f"{path} ({why})" for path, why in record.left if why != _SKIPPED]
    if unknown:
        _warn(f"{title} leaves {', '.join(unknown)} as it is: it cannot be taken apart")
    if given is None and not any(p.is_meta for p in module.parameters()):
        _warn(f"{title} was not checked: no input of {type(module).__name__} was found; hand one in with example=")
    return module


def looked_for(delta: Callable[[Part], Part]) -> dict[str, str]:
    """For each slot of a living module that the delta changes, which parts it looks for.

    Raises UserError where the delta is no drop-in part.
    """
    new, _, _ = _drop_in(delta, getattr(delta, "title", None) or getattr(delta, "__name__", "this change"))
    return {slot: living.LOOKED_FOR[slot] for slot in new}


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


@torch.no_grad()
def write(module: nn.Module, new: list[tuple[nn.Module, Tensor]]) -> None:
    """Give each of these linear maps inside the module its new weight (out, in), and no other user of that weight.

    Where several modules hold a weight, the one that is written gets its own copy first. Frozen stays frozen.
    """
    for linear, value in new:
        holder, name = linear.holder() if isinstance(linear, Slice) else (linear, "weight")
        old = holder._parameters[name]
        others = [p for m in module.modules() for n, p in m._parameters.items() if p is not None
                  if (m, n) != (holder, name) and _overlap(p, old)]  # fmt: skip
        if others:
            holder._parameters[name] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        if isinstance(linear, Slice):
            linear.write(value)
        else:
            linear.weight.copy_(value)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the two share memory. Views of one storage with a gap between them do not."""
    if a is b:
        return True
    if a.is_meta or b.is_meta or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    ends = lambda t: (t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride())))
    (start, stop), (other, end) = ends(a), ends(b)
    return start <= end and other <= stop


def _living(**slots: Part) -> None:
    """The root of the probe."""


_RECORD = "_deltax_applied"
_SKIPPED = "not selected"


def _changes(delta: Callable[[Part], Part], title: str) -> dict[str, Part]:
    """The slots that the delta fills or wraps, with what it puts there."""
    refusal = UserError(f"{title} is no drop-in part: use it in a recipe")
    if getattr(delta, "kind", "delta") != "delta":
        raise refusal

    def after(slots: Iterable[str]) -> dict[str, Part]:
        filled = delta(part(_living, **dict.fromkeys(slots, part(replacing.as_it_is))))
        return {slot: new for slot, new in filled.kwargs if new != part(replacing.as_it_is)}

    drop_in = (*living.LOOKED_FOR, "model")
    try:
        every = after(dict.fromkeys((*drop_in, *SLOTS)))
    except Exception:  # a delta that reads or sets what only a recipe has
        raise refusal from None
    if not set(every) & set(drop_in):
        raise UserError(f"{refusal}; it changes {', '.join(every)}, which no torch.nn.Module is searched for")
    try:
        after(drop_in)  # what it can do without, it does without here
    except Exception:
        others = ", ".join(slot for slot in every if slot not in drop_in)
        raise UserError(f"{refusal}; it also changes {others}, and half of a paper is not applied") from None
    return every


def _drop_in(delta: Callable[[Part], Part], title: str) -> tuple[dict[str, Part], Part | None, dict[str, Part]]:
    """What the delta puts in drop-in slots, around the whole module, and elsewhere."""
    changes = _changes(delta, title)
    new = {slot: changes.pop(slot) for slot in living.LOOKED_FOR if slot in changes}
    whole = changes.pop("model") if "model" in changes and replacing.wraps(changes["model"]) else None
    if not new and whole is None:
        raise UserError(f"{title} is no drop-in part: use it in a recipe; it replaces the whole model")
    return new, whole, changes


@contextmanager
def _whole_or_not_at_all(module: nn.Module, title: str) -> Iterator[None]:
    """After an exception the module and the random state are as they were, and what is raised is a UserError."""
    snapshot, drawn = probing.Snapshot(module), torch.get_rng_state()
    drawn_there = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except Exception as error:
        snapshot.restore()
        torch.set_rng_state(drawn)
        if drawn_there:
            torch.cuda.set_rng_state_all(drawn_there)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{title} cannot be applied to {type(module).__name__}: {living.said(error)}") from error


def _refuse_wrapped(module: nn.Module, title: str) -> None:
    for path, inner in module.named_modules():
        kind = next((k.__name__ for k in type(inner).__mro__ if k.__name__ in _WRAPPED), None)
        if kind is not None and not (kind == "GraphModule" and path):
            where = f"{path}, a {kind}" if path else f"a {kind}"
            raise UserError(f"{title} is not applied to {where}: {_WRAPPED[kind]}")


class _Surgery:
    """One delta on one module: its sites, the rewrite, the checks."""

    def __init__(self, module: nn.Module, new: dict[str, Part], title: str, given: probing.Given | None):
        self.module, self.new, self.title, self.given = module, new, title, given
        self.name = type(module).__name__
        self.placed: list[tuple[Site, nn.Module]] = []
        self.left: dict[str, str] = {}

    def done(self, where: Selection, skip: Selection) -> tuple[nn.Module, Applied]:
        self._refuse_twice()
        sites = self._selected(self._sites(), where, skip)
        before = {training: self._outputs(training) for training in (False, True)}
        if before[True] is not None and not probing.near(self._outputs(True), before[True], before[True]):
            before[True] = None  # a pass in training that does not repeat cannot be compared
        called = self._called([s.part for s in sites if isinstance(s.part, nn.Module)])
        sites = [self._by_use(s, called, before[False]) for s in sites]
        kinds = [type(s.part).__name__ for s in sites]
        intact = probing.Snapshot(self.module)
        root = self._rewritten(sites)
        unchecked = [site.path for site, _ in self.placed]
        if self.given is not None:
            self.module, old = root, self.module
            unchecked = self._checked(before, called, old, intact)
        replaced = tuple((s.path, kind, _class_at(s, p)) for kind, (s, p) in zip(kinds, self.placed))
        return root, Applied(self.title, replaced, tuple(self.left.items()), tuple(unchecked))

    def _by_use(self, site: Site, called: set[int], outputs: list[Tensor] | None) -> Site:
        """The site, at the part's weight where the owner reads the weight and does not call the part."""
        if outputs is None or site.raw or not isinstance(site.part, nn.Module) or id(site.part) in called:
            return site
        if not self._reads(site, outputs):
            return site
        if isinstance(site.part, nn.Linear) and self._merges(site.roles):
            return Site(site.owner, site.name, site.part, site.rows, "weight", site.path, site.roles)
        raise self._refusal(site.path, "its owner reads its weight and does not call it", site.path)

    def _merges(self, slots: Iterable[str]) -> bool:
        """Whether what is put there wraps a weight, and can be merged into it."""
        return all(replacing.wraps(self.new[s]) and hasattr(self.new[s].target, "merged") for s in slots)

    def _refuse_twice(self) -> None:
        for slot, new in self.new.items():
            if replacing.wraps(new) and isinstance(new.target, type):
                there = next((p for p, m in self.module.named_modules() if isinstance(m, new.target)), None)
                if there is not None:
                    raise UserError(
                        f"{self.name} has a {new.target.__name__} at {there or 'its root'} already: {self.title} wraps "
                        f"each {slot} once; merge or unwrap the first"
                    )

    def _sites(self) -> list[Site]:
        every = dict(self.module.named_modules(remove_duplicate=False))
        projects = {"query", "key", "value"} & set(self.new)
        fused = [path for path, m in every.items() if projects and living.is_fused(path, m)]
        found = list(living.find(self.module, probing.layouts(self.module, self.given, fused) if fused else None))
        return [s for s in found if set(s.rows or s.roles) & set(self.new)]

    def _selected(self, sites: list[Site], where: Selection, skip: Selection) -> list[Site]:
        """The sites that are rewritten. The others are noted as left, or refused."""
        paths = {s.path for s in sites}
        matches = lambda one, site, slots: site.path == one if one in paths else _matches(one, site, slots)
        for chosen, word in ((where, "where"), (skip, "skip")):
            for one in _several(chosen):
                if not any(matches(one, s, self.new) for s in sites):
                    known = [s.path for s in sites]
                    raise UserError(
                        f"{word}={one!r} matches no part of {self.name} that {self.title} looks for; "
                        f"there are {', '.join(known[:6]) or 'none'}{', ...' if len(known) > 6 else ''}"
                        f"{nearest(str(one), known)}"
                    )
        selected, refused = [], {}
        for site in sites:
            slots = [s for s in (site.rows or site.roles) if s in self.new]
            slots = [s for s in slots if where is None or any(matches(o, site, (s,)) for o in _several(where))]
            slots = [s for s in slots if not any(matches(o, site, (s,)) for o in _several(skip))]
            raw = site.raw and not self._merges(slots)
            if not slots:
                self.left[site.path] = _SKIPPED
            elif site.rows is None or raw:
                refused[site.path] = site.unknown or "its weight is a parameter of nn.MultiheadAttention"
            else:
                rows = site.rows if len(site.rows) > 1 else {s: site.rows[s] for s in slots}
                selected.append(Site(site.owner, site.name, site.part, rows, site.raw, site.path, tuple(slots)))
        self.left.update(refused)
        norms = [p for p in refused if any(s.path == p and {"norm", "qk_norm"} & set(s.roles) for s in sites)]
        if norms:
            raise UserError(
                f"{self.title} cannot replace {norms[0]} of {self.name}: {refused[norms[0]]}; "
                f"to leave it as it is, pass skip={norms[0]!r}"
            )
        missing = [s for s in self.new if not any(s in site.roles for site in selected)]
        if where is not None or skip is not None:
            missing = missing if not selected else []
        if missing:
            looked = "; ".join(f"{slot}: {living.LOOKED_FOR[slot]}" for slot in missing)
            apart = f" ({', '.join(refused)} cannot be taken apart)" if refused else ""
            why = "".join(f"; {path}: {reason}" for path, reason in refused.items())
            raise UserError(f"{self.title} looks for parts that {self.name} does not have{apart}; {looked}{why}")
        return selected

    def _rewritten(self, sites: list[Site]) -> nn.Module:
        made: dict[tuple[int, str | None], Any] = {}
        shared = replacing.shared_parameters(self.module)
        for site in sites:
            slots = {slot: self.new[slot] for slot in site.roles}
            key = (id(site.part), site.raw)
            if key not in made:
                made[key] = (
                    replacing.parametrise(site, slots)
                    if site.raw
                    else replacing.replacement(site, slots, self.module, shared)
                )
            self.placed.append((site, made[key]))
            if not site.raw and site.owner is None:
                return made[key]
            if not site.raw:
                setattr(site.owner, site.name, made[key])
        replacing.leave_fused_paths(self.module)
        return self.module

    def _outputs(self, training: bool) -> list[Tensor] | None:
        """What the module gives for the probe, None where it does not run."""
        if self.given is None:
            return None
        try:
            return probing.forward(self.module, self.given, training=training)
        except probing.ForwardFailed as error:
            self.failure = error
            return None

    def _called(self, parts: list[nn.Module]) -> set[int]:
        """The ids of those parts that a pass in evaluation calls."""
        if self.given is None:
            return set()
        try:
            return probing.calls(self.module, self.given, training=False, of=parts)
        except probing.ForwardFailed as error:
            raise self._refusal(error.path, str(error)) from error

    def _checked(
        self, before: dict[bool, Any], called: set[int], old: nn.Module, intact: probing.Snapshot
    ) -> list[str]:
        """Compare passes with those before. Returns the parts that no pass reached."""
        for training, outputs in before.items():
            after = self._outputs(training) if outputs is not None else None
            if outputs is None:
                continue
            if after is None:
                raise self._refusal(self.failure.path, str(self.failure)) from self.failure
            if [t.shape for t in after] != [t.shape for t in outputs]:
                raise self._refusal("", "the output has another shape")
        now = self._called([p for _, p in self.placed])
        idle = [s for s, p in self.placed if not s.raw and id(p) not in now]
        for site in idle:
            if id(site.part) in called:
                raise self._refusal(site.path, "its owner no longer calls what stands there", site.path)
        if all(self._merges(site.roles) for site, _ in self.placed):
            self._check_merged(before, old, intact)
        return [s.path for s in idle]

    def _reads(self, site: Site, outputs: list[Tensor]) -> bool:
        """Whether the output depends on the parameters of a part that is not called."""
        snapshot = probing.Snapshot(self.module)
        try:
            for holder in site.part.modules():
                for name, value in holder._parameters.items():
                    if value is not None and value.is_floating_point():
                        holder._parameters[name] = nn.Parameter(probing.random_like(value), requires_grad=False)
            return not probing.near(probing.forward(self.module, self.given, training=False), outputs, outputs)
        except probing.ForwardFailed:
            return False
        finally:
            snapshot.restore()

    def _check_merged(self, before: dict[bool, Any], old: nn.Module, intact: probing.Snapshot) -> None:
        """Wraps of a weight: at the start outputs are the old ones; with other values, those of the merged weight."""
        for training, outputs in before.items():
            if outputs is not None and not probing.near(self._outputs(training), outputs, outputs):
                raise self._refusal("", "the new parts change the output before they are trained")
        if not self._agrees(self.placed, before, old, intact):
            for one in self.placed:
                if not self._agrees([one], before, old, intact):
                    site = one[0]
                    raise self._refusal(
                        site.path, "with its weight merged the output is another, so its owner uses the weight itself"
                    )

    def _agrees(self, placed: list, before: dict[bool, Any], old: nn.Module, intact: probing.Snapshot) -> bool:
        """Whether new parts with random values act as the merged weights do."""
        wraps = [(s, slot, _wrap_at(p, slot)) for s, p in placed for slot in s.roles]
        with probing.randomised(wrap for *_, wrap in wraps):
            adapted = {training: self._outputs(training) for training, y in before.items() if y is not None}
            merged = {}
            seen: set[tuple[int, str]] = set()
            changed: dict[int, tuple[nn.Module, str, Tensor]] = {}
            for site, slot, wrap in wraps:
                if (id(site.part), slot) in seen:
                    continue
                seen.add((id(site.part), slot))
                holder, name = (site.part, site.raw or "weight")
                key = id(holder), name
                whole = changed.get(key, (holder, name, None))[2]
                whole = _stored(site.part, site.raw).detach().clone() if whole is None else whole
                view = whole.T if living.is_transposed(site.part) else whole
                rows = site.rows[slot]
                new = wrap.merged(living.taken(view, rows, 0)).detach()
                view.copy_(living.replaced(view, rows, new, 0))
                changed[key] = (holder, name, whole)
            with self._as_before(intact):
                for holder, name, whole in changed.values():
                    holder._parameters[name] = nn.Parameter(whole, requires_grad=False)
                for training in adapted:
                    merged[training] = probing.forward(old, self.given, training=training)
        return all(adapted[t] is not None and probing.near(adapted[t], merged[t], before[t]) for t in adapted)

    def _as_before(self, intact: probing.Snapshot) -> "probing.Before":
        return probing.Before(intact, probing.Snapshot(self.module))

    def _refusal(self, path: str, reason: str, skip: str = "") -> UserError:
        at = f" at {path}" if path else ""
        known = skip or next((s.path for s, _ in self.placed if s.path and path.startswith(s.path)), "")
        fix = f"; to leave that part as it is, pass skip={known!r}" if known else ""
        return UserError(f"{self.title} cannot be applied to {self.name}{at}: {reason}{fix}")


def _several(chosen: Selection) -> list[str | int]:
    return [] if chosen is None else [chosen] if isinstance(chosen, str | int) else list(chosen)


def _matches(one: str | int, site: Site, slots: Iterable[str]) -> bool:
    """Whether a pattern, slot or layer index means this site, for one of these slots."""
    if isinstance(one, int):
        return str(one) in site.path.split(".")
    if one in living.LOOKED_FOR:
        return one in slots and one in (site.rows or site.roles)
    return fnmatchcase(site.path, one)


def _stored(old: Any, raw: str | None) -> Tensor:
    name = raw or "weight"
    return old.parametrizations[name].original if parametrize.is_parametrized(old, name) else getattr(old, name)


def _class_at(site: Site, placed: nn.Module) -> str:
    return " and ".join(dict.fromkeys(type(_wrap_at(placed, slot)).__name__ for slot in site.roles))


def _wrap_at(placed: nn.Module, slot: str) -> nn.Module:
    """The new part of this slot, within what was put at the site."""
    if isinstance(placed, Fused):
        return placed.parts[slot]
    for chain in getattr(placed, "parametrizations", {}).values():
        if isinstance(chain[0], FusedWeight) and slot in chain[0].parts:
            return chain[0].parts[slot]
    return placed


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
