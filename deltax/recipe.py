"""A recipe is a tree of parts; a paper is a function from recipes to recipes.

A `Part` is a callable and the arguments already decided. Calling it supplies the rest and makes a new object, so one
part used for twelve blocks makes twelve blocks. Parts are frozen, hashable, print as Python and survive JSON.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from deltax.address import address, find
from deltax.errors import UserError, nearest

Value = Any  # None, a number, a word, a Part, or a tuple of these


@dataclass(frozen=True)
class Chapter:
    """One paper of a recipe's story, and what it wrote where."""

    paper: Any
    wrote: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True, repr=False)
class Part:
    """A callable and the arguments already decided. Build one with `part`, which checks the arguments.

    `story` says which papers made the tree; it is not compared, so two roads to one tree are equal.
    """

    make: Callable[..., Any]
    given: tuple[tuple[str, Value], ...] = ()
    base: "Part | None" = field(default=None, compare=False)
    story: tuple[Chapter, ...] = field(default=(), compare=False)

    def __call__(self, *args: Any, **late: Any) -> Any:
        return self.make(*args, **dict(self.given), **late)

    def __repr__(self) -> str:
        return f"{_name(self.make)}({', '.join(f'{k}={_show(v)}' for k, v in self.given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as in JSON, without its story: a paper's name may stand for the recipe that its function made."""
        return Part, (self.make, self.given)

    def __getitem__(self, path: str) -> Value:
        """What lies at a dotted path, defaults included: `gpt["model.block.mixer.heads"]`."""
        here: Value = self
        for step in _steps(path):
            here = _children(here).get(step, _MISSING)
            if here is _MISSING:
                raise UserError(f"{self.title} has nothing at {path!r}{nearest(path, (p for p, _ in self.walk()))}")
        return here

    @property
    def id(self) -> str:
        """A short hash of the tree, defaults in force included; equal trees have equal ids on every machine."""
        return hashlib.sha256(json.dumps(_full(self), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def title(self) -> str:
        """The story as it is written at the shell, `gpt+dyt(alpha=0.8)`."""
        return "+".join(_titled(chapter.paper) for chapter in self.story) or _name(self.make)

    def walk(self, path: str = "") -> Iterator[tuple[str, Value]]:
        """Every path with what lies there, defaults included, parents before children."""
        for step, value in _children(self).items():
            here = f"{path}.{step}" if path else step
            yield here, value
            if isinstance(value, Part):
                yield from value.walk(here)
            elif isinstance(value, tuple):
                for i, item in enumerate(value):
                    yield f"{here}.{i}", item
                    if isinstance(item, Part):
                        yield from item.walk(f"{here}.{i}")

    def slots(self) -> set[str]:
        """The names of all slots: arguments that hold a part."""
        return set(self._slots)

    @cached_property
    def _slots(self) -> frozenset[str]:
        return _slots(self)

    @cached_property
    def _written(self) -> "dict[tuple[str, Value], None]":
        return _marks(self)

    def fill(self, slot: str, new: "Callable[..., Any] | Part", /, **given: Value) -> "Part":
        """Put `new` in every slot of this name, keeping the arguments that both take."""

        def put(old: Part) -> Part:
            made = new if isinstance(new, Part) else part(new)
            kept = {k: v for k, v in old.given if k in takes(made.make)}
            return part(made.make, **{**kept, **dict(made.given), **given})

        return self._at_slots(slot, put)

    def wrap(self, slot: str, outer: Callable[..., Any], /, **given: Value) -> "Part":
        """Put what is in each slot of this name inside `outer`, as its `inner`."""
        return self._at_slots(slot, lambda old: part(outer, inner=old, **given))

    def set(self, make: Callable[..., Any], /, **given: Value) -> "Part":
        """Decide these arguments wherever `make` is made.

        Raises UserError when `make` is nowhere in the tree.
        """
        found = []

        def decide(_: str, old: Part) -> Part:
            if old.make is not make:
                return old
            found.append(old)
            return part(make, **{**dict(old.given), **given})

        new = self.rewrite(decide)
        if not found:
            raise UserError(f"there is no {_name(make)} in {self.title} to set {', '.join(given)} on")
        return new

    def put(self, path: str, value: Value) -> "Part":
        """Decide one argument by its dotted path, as `--set model.depth=6` does.

        Raises UserError for a path that is not there, with the nearest one that is.
        """
        steps = _steps(path)
        holder = self[".".join(steps[:-1])] if len(steps) > 1 else self
        if isinstance(holder, tuple) or not isinstance(holder, Part) or steps[-1] not in takes(holder.make):
            raise UserError(f"{self.title} has no {path!r} to set{nearest(path, (p for p, _ in self.walk()))}")

        def decide(here: str, old: Part) -> Part:
            return part(old.make, **{**dict(old.given), steps[-1]: value}) if here == ".".join(steps[:-1]) else old

        return self.rewrite(decide)

    def __add__(self, paper: Callable[["Part"], "Part"]) -> "Part":
        """This recipe, but with the paper's Y.

        Raises UserError when the paper is there already, changes nothing, or erases all that an earlier one wrote.
        """
        if not callable(paper):
            raise UserError(f"papers are added to a recipe, as in gpt + dyt; {paper!r} is none")
        if isinstance(paper, Part):
            raise UserError(f"{_titled(paper)} is a recipe, not a change to one; write it first: {_titled(paper)}+...")
        if any(_key(paper) == _key(chapter.paper) for chapter in self.story):
            raise UserError(f"{self.title} has {_key(paper)} already; write it once, with all its arguments")
        after = paper(self)
        if after == self:
            raise UserError(f"{_titled(paper)} changes nothing in {self.title}")
        before, now = self._written, after._written
        for chapter in self.story:
            if chapter.wrote and not any(mark in now for mark in chapter.wrote):
                raise UserError(f"{_titled(paper)} erases all of {_titled(chapter.paper)}; keep one of the two")
        wrote = tuple(mark for mark in now if mark not in before)
        return replace(after, base=self.base or self, story=(*self.story, Chapter(paper, wrote)))

    def without(self, paper: Callable[["Part"], "Part"]) -> "Part":
        """The same story, less one paper. Raises UserError when the paper is not in the story."""
        told = [chapter.paper for chapter in self.story]
        if paper not in told or self.base is None or paper in [chapter.paper for chapter in self.base.story]:
            raise UserError(f"{_titled(paper)} is not among the changes that made {self.title}")
        recipe = self.base
        for other in told[len(self.base.story) :]:
            recipe = recipe if other == paper else recipe + other
        return recipe

    def _at_slots(self, slot: str, edit: Callable[["Part"], "Part"]) -> "Part":
        if slot not in self._slots:
            raise UserError(f"{self.title} has no slot {slot!r}{nearest(slot, self._slots)}")

        def put(name: str, value: Value) -> Value:
            if isinstance(value, tuple):
                return tuple(put(str(i), item) for i, item in enumerate(value)) if slot in _slots(value) else value
            if not isinstance(value, Part):
                return value
            if slot in value._slots:
                value = replace(value, given=tuple((k, put(k, v)) for k, v in value.given))
            return edit(value) if name == slot else value

        return replace(self, given=tuple((k, put(k, v)) for k, v in self.given))

    def rewrite(self, edit: Callable[[str, "Part"], "Part"], path: str = "") -> "Part":
        """Apply edit(path, part) to every part, leaves first; every verb is made of this. The root keeps the story.

        What stays as it was stays the same object, so that comparing with it is quick.
        """

        def inner(value: Value, here: str) -> Value:
            if isinstance(value, Part):
                return value.rewrite(edit, here)
            if isinstance(value, tuple):
                items = tuple(inner(item, f"{here}.{i}") for i, item in enumerate(value))
                return items if any(a is not b for a, b in zip(items, value)) else value
            return value

        given = tuple((k, inner(v, f"{path}.{k}" if path else k)) for k, v in self.given)
        same = all(a is b for (_, a), (_, b) in zip(given, self.given))
        new = edit(path, self if same else replace(self, given=given))
        return new if path or new is self else replace(new, base=self.base, story=self.story)


def part(make: Callable[..., Any], /, **given: Value) -> Part:
    """A Part, checked: every argument is one that `make` takes, and `make` can be imported again by name.

    Arguments equal to their default are dropped and defaults that are parts are taken into the tree, so that
    equal trees compare equal and rewrites see everything. Raises UserError with the nearest name for a misspelt one.
    """
    if isinstance(make, Part):
        return part(make.make, **{**dict(make.given), **given})
    if "<" in getattr(make, "__qualname__", "<"):
        raise UserError(f"{make!r} cannot be found again by name; a part is made by a module's function or class")
    names = takes(make)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())
    for word in given:
        if word not in names and not open_ended:
            raise UserError(f"{_name(make)} takes no {word!r}{nearest(word, names)}")
    defaults = _defaults(make)
    decided = {k: v for k, v in defaults.items() if isinstance(v, Part)}
    for word, value in given.items():
        value = _frozen(value, f"{_name(make)}({word}=...)")
        if isinstance(value, Part) or type(value) is not type(defaults.get(word)) or value != defaults.get(word):
            decided[word] = value
    order = list(names)
    return Part(make, tuple(sorted(decided.items(), key=lambda kv: order.index(kv[0]) if kv[0] in order else 99)))


def diff(a: Value, b: Value, path: str = "") -> list[tuple[str, str, str]]:
    """(path, in a, in b) for each place where two trees differ."""
    if a == b:
        return []
    if isinstance(a, Part) and isinstance(b, Part) and a.make is b.make:
        ours, theirs = _children(a), _children(b)
        return [
            line for k in {**ours, **theirs} for line in diff(ours.get(k), theirs.get(k), f"{path}.{k}" if path else k)
        ]
    return [(path, _show(a), _show(b))]


def to_json(value: Value) -> Any:
    """A tree as JSON-ready data: {"make": address, "given": {...}}. `deltax.address` says what an address is."""
    if isinstance(value, Part):
        return {"make": address(value.make), "given": {k: to_json(v) for k, v in value.given}}
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


def from_json(data: Any) -> Value:
    """The tree back from `to_json`, checked as if it were written anew.

    Raises UserError for whatever `deltax.address.find` refuses: a stored recipe reaches only parts.
    """
    if isinstance(data, dict):
        if data.keys() != {"make", "given"} or not isinstance(data["given"], dict):
            raise UserError(f"a part of a stored recipe has 'make' and 'given', not {', '.join(map(repr, data))}")
        return part(find(data["make"]), **{k: from_json(v) for k, v in data["given"].items()})
    return tuple(from_json(item) for item in data) if isinstance(data, list) else data


_MISSING = object()


def _steps(path: str) -> list[str]:
    return path.split(".")


def _children(value: Value) -> dict[str, Value]:
    if isinstance(value, Part):
        return {**_defaults(value.make), **dict(value.given)}
    return {str(i): item for i, item in enumerate(value)} if isinstance(value, tuple) else {}


def _marks(value: Value, path: str = "") -> dict[tuple[str, Value], None]:
    """Every decided path with what is made or held there, in order; a part is known by its maker.

    What a wrap holds has the wrap's own path: it was moved, not written.
    """
    items = value.given if isinstance(value, Part) else enumerate(value) if isinstance(value, tuple) else ()
    found: dict[tuple[str, Value], None] = {}
    for k, v in items:
        here = path if k == "inner" else f"{path}.{k}"
        found[here, v.make if isinstance(v, Part) else v] = None
        found |= _marks(v, here)
    return found


def _full(value: Value) -> Any:
    if isinstance(value, Part):
        return {"make": address(value.make), "given": {k: _full(v) for k, v in _children(value).items()}}
    if isinstance(value, tuple):
        return [_full(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)


def _frozen(value: Value, where: str) -> Value:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, where) for item in value)
    if callable(value) and not isinstance(value, Part):
        return part(value)
    if not isinstance(value, (Part, str, int, float, type(None))):
        raise UserError(f"{where} is a {type(value).__name__}; a recipe holds numbers, words, tuples and parts")
    return value


@lru_cache(maxsize=4096)
def takes(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return {k: p for k, p in inspect.signature(make).parameters.items() if k != "self"}
    except ValueError:
        raise UserError(f"{_name(make)} is written in C and names no arguments; wrap it in a function") from None


def _slots(value: Value) -> frozenset[str]:
    """The names under a value that hold parts, at any depth."""
    found: set[str] = set()
    for name, inner in _children(value).items():
        if isinstance(inner, Part):
            found |= {name, *inner._slots}
        elif isinstance(inner, tuple):
            found |= _slots(inner)
    return frozenset(found)


@lru_cache(maxsize=4096)
def _defaults(make: Callable[..., Any]) -> dict[str, Any]:
    return {k: p.default for k, p in takes(make).items() if p.default is not p.empty}


def _name(make: Any) -> str:
    return getattr(make, "__name__", None) or type(make).__name__


def _titled(paper: Any) -> str:
    return getattr(paper, "title", None) or _name(paper)


def _key(paper: Any) -> str:
    return getattr(paper, "key", None) or _name(paper)


def _show(value: Value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_show(item) for item in value)})"
    return repr(value)
