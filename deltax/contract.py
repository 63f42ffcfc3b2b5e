"""How the parts of a run meet: each declares what it gives and what it needs, and `check` compares the two.

    task        the NamedTuple that `batch` is annotated with: the fields of a batch;
                the TypedDict that `task_spec` is annotated with: what a model's constructor is told
    model       `interface`, one of the constants below: what it is called with, and what it returns
    objective   `@needs("images", "labels", model=IMAGES_TO_LOGITS)`: the fields it reads, and the model it calls;
                the annotation of its `model` where only one class of model will do
    batches     as an objective; a return annotation where the batches are not the task's
    any part    `@needs(inner=("Attention", "MLP"))`: the parts that one of its slots can hold;
                `gives_context` and `hides_context`: what of the `Context` the parts in it have; what those in it
                and beside it lose

An argument that is annotated as a whole number counts something: it is at least 1, or at least 0 where that is its
default or where the part lists it in `can_be_zero`.

What declares nothing is not checked. A part whose result at a position depends on later ones by design declares it in
a sentence, `looks_ahead`, which is printed wherever such a recipe is scored.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, get_args

from deltax.errors import UserError

TOKENS_TO_LOGITS = "tokens (B, T) -> logits (B, T, V) of each next token"
SOURCE_TO_LOGITS = "source (B, S), tokens (B, T) -> logits (B, T, V) of each next token"
CAUSAL = (TOKENS_TO_LOGITS, SOURCE_TO_LOGITS)
IMAGES_TO_LOGITS = "images (B, C, Y, X) -> logits (B, V)"
IMAGES_TO_VECTORS = "images (B, C, Y, X) -> vectors (B, K)"
IMAGES_TO_IMAGES = "images (B, C, Y, X) -> images (B, C, Y, X)"
IMAGES_TO_OBJECTS = "images (B, C, Y, X) -> classes and boxes of N queries"
IMAGES_TO_REGIONS = "images (B, C, Y, X), boxes -> classes and offsets of regions"
IMAGES_TO_ANCHORS = "images (B, C, Y, X) -> classes and offsets of every anchor"
IMAGES_TO_MASKS = "images (B, C, Y, X) -> classes and masks of N queries"
IMAGES_TO_MASKED_PATCHES = "images (B, C, Y, X) -> patches predicted from the unmasked ones"
NOISE_TO_IMAGES = "noised images (B, C, Y, X), times (B,), labels (B,) -> images (B, C, Y, X)"
PIXELS_TO_PIXELS = "pixels (B, C, ...) -> reconstruction and latent cost"
PAIRS_TO_LOGITS = "images (B, C, Y, X), texts (B, T) -> logits (B, B)"
SENSES_TO_LOGITS = "images, texts, other images, sounds -> two tables of logits (B, B)"
TRACKS_TO_SCENE = "tracks (B, N, P, 3) -> scene"

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """What a function or class needs of the parts that it meets; made by `needs`.

    fields   read of a batch; `{of}` is the value of its own argument `of`
    without  fields that a batch must not have, because they would no longer be true of it
    model    what the model maps, or for a wrapper its inner model
    task     attributes that the task has
    context  what of the `Context` a part around this one must give
    inside   parts of which it must have one in it, at any depth
    outside  parts that it must not have in it, at any depth
    beside   slot of the same owner -> names of the classes that it can hold
    slots    slot, or a dotted path of slots -> names of the classes that it can hold, bases included
    """

    fields: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    model: str = ""
    task: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    beside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    slots: dict[str, tuple[str, ...]] = field(default_factory=dict)


_NOTHING = Needs()


def needs(
    *fields: str,
    without: tuple[str, ...] = (),
    model: str = "",
    task: tuple[str, ...] = (),
    context: tuple[str, ...] = (),
    inside: tuple[str, ...] = (),
    outside: tuple[str, ...] = (),
    beside: dict[str, tuple[str, ...]] | None = None,
    **slots: tuple[str, ...],
) -> Callable[[Made], Made]:
    """Declare what an objective, a source of batches, a wrapper or a part needs; see the module's docstring."""

    def declare(made: Made) -> Made:
        made.needs = Needs(fields, without, model, task, context, inside, outside, beside or {}, slots)  # type: ignore[attr-defined]
        return made

    return declare


def check(root: Any, said: str) -> None:
    """Raise UserError for the first two parts of a recipe that do not fit, as "`said`: which, and what each needs"."""
    for problem in problems(root):
        raise UserError(f"{said}: {problem}")


def problems(root: Any) -> Iterator[str]:
    """A sentence for each pair of parts that do not fit."""
    run = _children(root)
    if all(_is_part(run.get(slot)) for slot in ("model", "task", "objective", "batches")):
        yield from _met(run["model"], run["task"], run["objective"], run["batches"])
    yield from _held(root, "", frozenset())


def interface(model: Any) -> str:
    """What a model maps: its own declaration, or that of the model that it wraps."""
    found: str = getattr(_declaring(model).target, "interface", "")
    return found


def task_spec(task: Any) -> frozenset[str] | None:
    """The names of what a task tells a model's constructor; None where it does not declare them."""
    annotated = getattr(getattr(task.target, "task_spec", None), "fget", None)
    return _names(annotated)


def fields(batches: Any, task: Any) -> frozenset[str] | None:
    """The fields of the batches that a run learns from; None where nothing declares them."""
    for part in _chain(batches):
        if (found := _names(part.target)) is not None:
            return found
    return _names(getattr(task.target, "batch", None))


def looks_ahead(recipe: Any) -> list[str]:
    """A sentence for each part of a recipe that depends on later positions by design."""
    said = [getattr(part.target, "looks_ahead", None) for part in [recipe, *_parts(recipe)]]
    return list(dict.fromkeys(sentence for sentence in said if sentence))


def _met(model: Any, task: Any, objective: Any, batches: Any) -> Iterator[str]:
    given, told = fields(batches, task), task_spec(task)
    source = batches if any(_names(part.target) is not None for part in _chain(batches)) else task
    names = [_name(part) for part in _chain(model)]
    for part in (objective, *_chain(batches)):
        need = _needs(part)
        if given is not None:
            read = [name.format(**_children(part)) for name in need.fields]
            if lacking := [name for name in read if name not in given]:
                yield f"{_name(part)} reads {_and(lacking)} of a batch, and {_name(source)} gives {_and(sorted(given))}"
            if spoilt := [name for name in need.without if name in given]:
                yield f"{_name(part)} would leave the {_and(spoilt)} of {_name(source)} where they were"
        yield from _mapped(_name(part), "needs a model that maps", need.model, model)
        if lacking := [name for name in need.task if name not in _attributes(task.target)]:
            yield f"{_name(part)} needs a task with {_and(lacking)}, and {_name(task)} has none"
        wanted = _annotated(part.target, "model")
        if wanted and not any(wanted in _bases(inner.target) for inner in _chain(model)):
            yield f"{_name(part)} needs a {wanted} around the model, and this one is {_and(names)}"
    for outer, inner in zip(_chain(model), _chain(model)[1:]):
        yield from _mapped(_name(outer), "needs an inner model that maps", _needs(outer).model, inner)
    yield from _mapped(_name(task), "evaluates a model that maps", _needs(task).model, model)
    if told is not None:
        for part in _chain(model):
            if lacking := sorted(_asked(part) - told):
                yield f"{_name(part)} is built from {_and(lacking)}, and {_name(task)} gives {_and(sorted(told))}"


def _mapped(who: str, needs: str, wanted: str, model: Any) -> Iterator[str]:
    if wanted and (found := interface(model)) and found != wanted:
        yield f"{who} {needs} {wanted}, and {_name(_declaring(model))} maps {found}"


def _held(part: Any, path: str, told: frozenset[str]) -> Iterator[str]:
    """What is missing from a part, or put in a slot of it that cannot hold it; then the same of the parts in it."""
    own, need = _children(part), _needs(part)
    for slot, allowed in need.slots.items():
        if not _fits(held := _below(part, slot), allowed):
            yield f"{_name(part)} takes {_or(allowed)} as its {slot}, not {_name(held)}{_at(path)}"
    for inner in own.values():
        for slot, allowed in _needs(inner).beside.items() if _is_part(inner) else ():
            if not _fits(held := own.get(slot), allowed):
                yield f"{_name(inner)} takes {_or(allowed)} as the {slot}, not {_name(held)}{_at(path)}"
    if lacking := [name for name in need.context if name not in told]:
        yield f"{_name(part)} needs the {_and(lacking)} of a stream, which no part around it gives{_at(path)}"
    if need.inside and not any(_bases(inner.target) & set(need.inside) for inner in _parts(part)):
        yield f"{_name(part)} needs a {_or(need.inside)} in it, and there is none{_at(path)}"
    if alien := [_name(inner) for inner in _parts(part) if _bases(inner.target) & set(need.outside)]:
        yield f"{_name(part)} cannot have a {alien[0]} in it{_at(path)}"
    yield from _counted(part, own, path)
    told = told.union(getattr(part.target, "gives_context", ()))
    for inner in (part, *filter(_is_part, own.values())):
        told = told.difference(getattr(inner.target, "hides_context", ()))
    if path and path != "model":
        for name, parameter in (_signature(part.target) if _is_class(part) else {}).items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name not in own:
                yield f"{_name(part)} lacks its {name}{_at(path)}"
    for slot, value in own.items():
        for i, inner in enumerate(value if isinstance(value, tuple) else (value,)):
            if _is_part(inner):
                here = f"{slot}.{i}" if isinstance(value, tuple) else slot
                yield from _held(inner, f"{path}.{here}" if path else here, told)


def _counted(part: Any, own: dict[str, Any], path: str) -> Iterator[str]:
    """The whole numbers among a part's arguments that are below the least that they can be."""
    for name, parameter in _signature(part.target).items():
        value, usual = own.get(name), parameter.default
        is_count = parameter.annotation is int or int in get_args(parameter.annotation)
        if not is_count or type(value) is not int or (type(usual) is int and usual < 0):
            continue
        least = 0 if usual == 0 or name in getattr(part.target, "can_be_zero", ()) else 1
        if value < least:
            yield f"{name} of {_name(part)} is at least {least}, not {value} (at {path}.{name})".replace(
                "(at .", "(at "
            )


def _below(part: Any, path: str) -> Any:
    """What lies at a dotted path of slots; None where it ends before."""
    for slot in path.split("."):
        part = _children(part).get(slot) if _is_part(part) else None
    return part


def _fits(held: Any, allowed: tuple[str, ...]) -> bool:
    return not _is_part(held) or bool(_bases(held.target) & set(allowed))


def _parts(part: Any) -> Iterator[Any]:
    for value in _children(part).values():
        for inner in value if isinstance(value, tuple) else (value,):
            if _is_part(inner):
                yield inner
                yield from _parts(inner)


def _declaring(model: Any) -> Any:
    """The part of a wrapped model that declares what it maps, or the model itself."""
    return next((part for part in _chain(model) if hasattr(part.target, "interface")), model)


def _chain(part: Any) -> list[Any]:
    """A part, the part that it wraps, and so on inwards."""
    found = [part]
    while _is_part(inner := _children(found[-1]).get("inner")):
        found.append(inner)
    return found


def _asked(part: Any) -> set[str]:
    """The arguments of a model's constructor that only a task can decide."""
    decided, names = _children(part), _signature(part.target)
    asked = {name for name, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return asked - set(decided)


def _needs(part: Any) -> Needs:
    found: Needs = getattr(part.target, "needs", _NOTHING)
    return found


def _is_class(part: Any) -> bool:
    return inspect.isclass(part.target)


def _is_part(value: Any) -> bool:
    return hasattr(value, "target") and hasattr(value, "kwargs")


def _children(part: Any) -> dict[str, Any]:
    usual = {k: p.default for k, p in _signature(part.target).items() if p.default is not p.empty}
    return {**usual, **dict(part.kwargs)}


def _name(part: Any) -> str:
    return getattr(part.target, "__name__", None) or type(part.target).__name__


def _at(path: str) -> str:
    return f" (at {path})" if path else ""


def _and(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _or(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


@lru_cache(maxsize=4096)
def _signature(make: Any) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(make).parameters.items() if k != "self"}


def _names(function: Any) -> frozenset[str] | None:
    """The names of the NamedTuple or TypedDict that a function is annotated to return."""
    returned = getattr(function, "__annotations__", {}).get("return")
    keys = getattr(returned, "_fields", None) or getattr(returned, "__required_keys__", None)
    return None if keys is None else frozenset(keys)


def _annotated(function: Any, name: str) -> str:
    """The class that a function's argument must be; nothing where any module will do."""
    said = getattr(function, "__annotations__", {}).get(name)
    said = getattr(said, "__name__", said) if not isinstance(said, str) else said
    return "" if said in (None, "Module", "nn.Module", "Any") else str(said)


def _bases(make: Any) -> set[str]:
    return {base.__name__ for base in inspect.getmro(make)} if inspect.isclass(make) else {_name_of(make)}


def _name_of(make: Any) -> str:
    return getattr(make, "__name__", "")


@lru_cache(maxsize=256)
def _attributes(make: Any) -> frozenset[str]:
    """The attributes of a class, those included that a class body annotates."""
    annotated = {name for base in inspect.getmro(make) for name in getattr(base, "__annotations__", {})}
    return frozenset(dir(make)) | annotated
