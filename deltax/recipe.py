"""A recipe is a tree of parts; a paper is a function from recipes to recipes.

A `Part` is a callable and the arguments already decided. Calling it supplies the rest and makes a new object, so one
part used for twelve blocks makes twelve blocks. Parts are frozen, hashable, print as Python and survive JSON.
"""

import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from deltax import contract
from deltax.address import address, arguments, find
from deltax.errors import UserError, nearest

Value = Any  # None, a number, a word, a Part, or a tuple of these


Mark = tuple[str, int]  # an argument's name, "" for the maker, and the number of the call of `part` that wrote it
Place = tuple[Any, ...]  # a path, what holds it, and what is there


@dataclass(frozen=True)
class AppliedPaper:
    """One paper of a recipe's story, and the marks that it left in the tree."""

    paper: Any
    wrote: frozenset[Mark] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, repr=False)
class Part:
    """A callable and the arguments already decided. Build one with `part`, which checks the arguments.

    `history` is the papers that made the tree; it is not compared, so two roads to one tree are equal. Neither is
    `written`, the number of the call of `part` that wrote the maker ("") and each argument. An argument equal to its
    default is dropped from `kwargs` and stays in `written`; a default that nobody wrote is in neither.
    """

    target: Callable[..., Any]
    kwargs: tuple[tuple[str, Value], ...] = ()
    base: "Part | None" = field(default=None, compare=False)
    history: tuple[AppliedPaper, ...] = field(default=(), compare=False)
    written: dict[str, int] = field(default_factory=dict, compare=False)

    def __call__(self, *args: Any, **late: Any) -> Any:
        return self.target(*args, **dict(self.kwargs), **late)

    def __repr__(self) -> str:
        return f"{_name(self.target)}({', '.join(f'{k}={_show(v)}' for k, v in self.kwargs)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as in JSON, without its story: a paper's name may stand for the recipe that its function made."""
        return Part, (self.target, self.kwargs)

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
        return "+".join(_titled(applied.paper) for applied in self.history) or _name(self.target)

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
    def _marks(self) -> "list[tuple[Mark, Place]]":
        return list(_marks(self))

    def fill(self, slot: str, new: "Callable[..., Any] | Part", /, **kwargs: Value) -> "Part":
        """Put `new` in every slot of this name, keeping the arguments that both take and `new` does not write."""

        def put(old: Part) -> Part:
            made = part(new, **kwargs)
            names = takes(made.target)
            kept = {k: v for k, v in old.kwargs if k in names and k not in made.written and k not in dict(made.kwargs)}
            filled = part(made.target, **{**kept, **dict(made.kwargs)})
            before = {k: old.written[k] for k in kept if k in old.written}
            return replace(filled, written={**before, **dict.fromkeys(made.written, filled.written[""])})

        return self._at_slots(slot, put)

    def wrap(self, slot: str, outer: Callable[..., Any], /, **kwargs: Value) -> "Part":
        """Put what is in each slot of this name inside `outer`, as its `inner`; once, not twice."""

        def put(old: Part) -> Part:
            if old.target is outer:
                raise UserError(f"{slot} of {self.title} is inside {_name(outer)} already; wrap it once")
            return part(outer, inner=old, **kwargs)

        return self._at_slots(slot, put)

    def set(self, target: Callable[..., Any], /, **kwargs: Value) -> "Part":
        """Decide these arguments wherever `target` is made.

        Raises UserError when `target` is nowhere in the tree.
        """
        found = []

        def decide(_: str, old: Part) -> Part:
            if old.target is not target:
                return old
            found.append(old)
            return part(old, **kwargs)

        new = self.rewrite(decide)
        if not found:
            raise UserError(f"there is no {_name(target)} in {self.title} to set {', '.join(kwargs)} on")
        return new

    def put(self, path: str, value: Value) -> "Part":
        """Decide one argument by its dotted path, as `--set model.depth=6` does.

        Raises UserError for a path that is not there, with the nearest one that is.
        """
        steps = _steps(path)
        holder = self[".".join(steps[:-1])] if len(steps) > 1 else self
        if isinstance(holder, tuple) or not isinstance(holder, Part) or steps[-1] not in takes(holder.target):
            raise UserError(f"{self.title} has no {path!r} to set{nearest(path, (p for p, _ in self.walk()))}")

        def decide(here: str, old: Part) -> Part:
            return part(old, **{steps[-1]: value}) if here == ".".join(steps[:-1]) else old

        return self.rewrite(decide)

    def __add__(self, paper: Callable[["Part"], "Part"]) -> "Part":
        """This recipe, but with the paper's Y.

        Raises UserError when the paper is there already, changes nothing, or erases a mark of an earlier one that it
        does not declare to replace. What is replaced whole leaves the story.
        """
        if not callable(paper):
            raise UserError(f"papers are added to a recipe, as in gpt + dyt; {paper!r} is none")
        if isinstance(paper, Part):
            raise UserError(f"{_titled(paper)} is a recipe, not a change to one; write it first: {_titled(paper)}+...")
        if any(_key(paper) == _key(applied.paper) for applied in self.history):
            raise UserError(f"{self.title} has {_key(paper)} already; write it once, with all its arguments")
        after = paper(self)
        if after == self:
            raise UserError(f"{_titled(paper)} changes nothing in {self.title}")
        replaced = {_key(x) for x in getattr(paper, "replaces", ())}
        history = []
        for applied in self.history:
            kept, lost = _survivors(applied.wrote, self._marks, after._marks)
            if lost and _key(applied.paper) not in replaced:
                raise UserError(_erased(paper, applied.paper, lost, after, bool(kept)))
            if kept or not lost:
                history.append(replace(applied, wrote=kept))
        contract.check(after, f"{_titled(paper)} does not fit {self.title}")
        return replace(
            after, base=self.base or self, history=(*history, AppliedPaper(paper, _wrote(self._marks, after._marks)))
        )

    def without(self, paper: Callable[["Part"], "Part"]) -> "Part":
        """The same story, less one paper, with all that was set outside it. Raises UserError when the paper is not in
        the story, and when something was set in what the paper brought."""
        told = [applied.paper for applied in self.history]
        if paper not in told or self.base is None or paper in [applied.paper for applied in self.base.history]:
            raise UserError(f"{_titled(paper)} is not among the changes that made {self.title}")
        whole = recipe = self.base
        for other in told[len(self.base.history) :]:
            whole, recipe = whole + other, recipe if other == paper else recipe + other
        for path, value in _edits(whole, self):
            try:
                recipe = recipe.put(path, value)
            except UserError:
                said = f"{path or 'the root'}={_show(value)} was set by hand in {self.title}"
                raise UserError(f"{said} and has no place without {_titled(paper)}; set it back first") from None
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
                value = replace(value, kwargs=tuple((k, put(k, v)) for k, v in value.kwargs))
            return edit(value) if name == slot else value

        return replace(self, kwargs=tuple((k, put(k, v)) for k, v in self.kwargs))

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

        kwargs = tuple((k, inner(v, f"{path}.{k}" if path else k)) for k, v in self.kwargs)
        same = all(a is b for (_, a), (_, b) in zip(kwargs, self.kwargs))
        new = edit(path, self if same else replace(self, kwargs=kwargs))
        return new if path or new is self else replace(new, base=self.base, history=self.history)


def part(target: Callable[..., Any], /, **kwargs: Value) -> Part:
    """A Part, checked: every argument is one that `target` takes, and `target` can be imported again by name.

    Arguments equal to their default are dropped and defaults that are parts are taken into the tree, so that
    equal trees compare equal and rewrites see everything; `written` has which were given. Of a part, the same part with
    these arguments too. Raises UserError with the nearest name for a misspelt one.
    """
    if isinstance(target, Part):
        new = part(target.target, **{**dict(target.kwargs), **kwargs})
        stamps = {"": new.written[""], **target.written, **dict.fromkeys(kwargs, new.written[""])}
        return replace(new, written=stamps)
    if "<" in getattr(target, "__qualname__", "<"):
        raise UserError(f"{target!r} cannot be found again by name; a part is made by a module's function or class")
    names = takes(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())
    for word in kwargs:
        if word not in names and not open_ended:
            raise UserError(f"{_name(target)} takes no {word!r}{nearest(word, names)}")
    defaults = _defaults(target)
    decided = {k: v for k, v in defaults.items() if isinstance(v, Part)}
    for word, value in kwargs.items():
        value = _frozen(value, f"{_name(target)}({word}=...)")
        usual = defaults.get(word, _MISSING)
        if isinstance(value, Part) or type(value) is not type(usual) or value != usual:
            decided[word] = value
    order = list(names)
    held = tuple(sorted(decided.items(), key=lambda kv: order.index(kv[0]) if kv[0] in order else 99))
    return Part(target, held, written=dict.fromkeys(("", *kwargs), next(_CALLS)))


def diff(a: Value, b: Value, path: str = "") -> list[tuple[str, str, str]]:
    """(path, in a, in b) for each place where two trees differ; a part is shown with its own leaves.

    Children are matched by slot name, also where their makers differ and through a wrap, so that a line is about one
    part. What is "absent" in b is one line; of what is absent in a, the parts that a has nowhere have their lines. A
    path is one of b, and of a where b has nothing.
    """
    known = {v for _, v in a.walk() if isinstance(v, Part)} if isinstance(a, Part) else set()

    def compare(a: Value, b: Value, path: str) -> Iterator[tuple[str, str, str]]:
        if a is _MISSING and b in known:
            return
        if a is not _MISSING and b is not _MISSING and a == b:
            return
        here: Callable[[str], str] = lambda step: f"{path}.{step}".lstrip(".")
        ours, theirs = _below(a), _below(b)
        if isinstance(a, Part) and isinstance(b, Part) and a.target is b.target:
            ours, theirs = _children(a), _children(b)
        elif not (ours and theirs and isinstance(a, tuple) and isinstance(b, tuple)):
            yield path, _headed(a), _headed(b)
        if b is _MISSING:
            return
        if a is not _MISSING and ("inner" in ours) != ("inner" in theirs):
            within = here("inner") if "inner" in theirs else path
            yield from compare(ours.pop("inner", a), theirs.pop("inner", b), within)
            ours, theirs = {}, theirs if "inner" in _children(b) else {}
        for k in {**ours, **theirs}:
            yield from compare(ours.get(k, _MISSING), theirs.get(k, _MISSING), here(k))

    return list(compare(a, b, path))


def to_json(value: Value) -> Any:
    """A tree as JSON-ready data: {"make": address, "given": {...}}. `deltax.address` says what an address is."""
    if isinstance(value, Part):
        return {"make": address(value.target), "given": {k: to_json(v) for k, v in value.kwargs}}
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


def from_json(data: Any) -> Value:
    """The tree back from `to_json`, checked as if it were written anew.

    Raises UserError for whatever `deltax.address.find` refuses: a stored recipe reaches only parts.
    """
    if isinstance(data, dict):
        if data.keys() != {"make", "given"} or not isinstance(data["given"], dict):
            raise UserError(f"a part of a stored recipe has 'make' and 'given', not {', '.join(map(repr, data))}")
        target = find(data["make"])
        return part(target, **{k: from_json(v) for k, v in arguments(target, data["given"]).items()})
    return tuple(from_json(item) for item in data) if isinstance(data, list) else data


_MISSING = object()
_CALLS = itertools.count(1)


def _steps(path: str) -> list[str]:
    return path.split(".")


def _children(value: Value) -> dict[str, Value]:
    if isinstance(value, Part):
        return {**_defaults(value.target), **dict(value.kwargs)}
    return {str(i): item for i, item in enumerate(value)} if isinstance(value, tuple) else {}


def _marks(value: Value, path: str = "", slot: Any = None) -> Iterator[tuple[Mark, Place]]:
    """Every mark in a tree and its place, in order: all that was written, and no default that was only taken in.

    What a wrap holds has the wrap's own path: it was moved, not written.
    """
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _marks(item, f"{path}.{i}")
    if not isinstance(value, Part):
        return
    if "" in value.written:
        yield ("", value.written[""]), (path, value.target)
    held = _children(value)
    for k, stamp in value.written.items():
        if k and not _holds_parts(held.get(k)):
            yield (k, stamp), (f"{path}.{k}".lstrip("."), value.target, held.get(k))
    for k, v in value.kwargs:
        yield from _marks(v, path if k == "inner" else f"{path}.{k}".lstrip("."))


def _below(value: Value) -> dict[str, Value]:
    """The children that are parts, or hold some."""
    return {k: v for k, v in _children(value).items() if _holds_parts(v)}


def _headed(value: Value) -> str:
    """A part with its leaves and without its parts: these have lines of their own."""
    if value is _MISSING:
        return "absent"
    if isinstance(value, tuple) and _holds_parts(value):
        return f"{len(value)} parts"
    return _show(replace(value, kwargs=_leaves(value)) if isinstance(value, Part) else value)


def _leaves(value: Part) -> tuple[tuple[str, Value], ...]:
    return tuple((k, v) for k, v in value.kwargs if not _holds_parts(v))


def _holds_parts(value: Value) -> bool:
    return isinstance(value, Part) or (isinstance(value, tuple) and any(map(_holds_parts, value)))


def _wrote(before: list[tuple[Mark, Place]], now: list[tuple[Mark, Place]]) -> frozenset[Mark]:
    """The marks that one paper left: those that are new, else (a part that many papers share) those in more places.

    What was copied from elsewhere in the tree was written by whoever wrote the original.
    """
    had, has = Counter(mark for mark, _ in before), Counter(mark for mark, _ in now)
    return frozenset(has.keys() - had.keys()) or frozenset(mark for mark in has if has[mark] > had[mark])


def _survivors(
    wrote: frozenset[Mark], before: list[tuple[Mark, Place]], now: list[tuple[Mark, Place]]
) -> tuple[frozenset[Mark], list[Place]]:
    """Of an earlier paper's marks those still there, and the places of those that are gone.

    A mark that a later paper wrote over with the same value at the same place is still there.
    """
    has, places = Counter(mark for mark, _ in now), {place: mark for mark, place in now}
    short = {mark for mark, count in Counter(m for m, _ in before if m in wrote).items() if has[mark] < count}
    kept, lost = {mark for mark in wrote if has[mark]}, []
    for mark, place in before:
        if mark in short and place in places:
            kept.add(places[place])
        elif mark in short:
            lost.append(place)
    return frozenset(kept), lost


def _erased(paper: Any, earlier: Any, lost: list[Place], after: Part, partly: bool) -> str:
    path, *_, was = lost[0]
    there = [v for p, v in after.walk() if ".".join(step for step in p.split(".") if step != "inner") == path]
    shown = [
        _name(v.target) if isinstance(v, Part) else _name(v) if callable(v) else _show(v) for v in (was, *there[:1])
    ]
    what = f"{path}: {' becomes '.join(shown)}" if there and shown[0] != shown[-1] else f"{path}: {shown[0]} is gone"
    extent = "part" if partly else "all"
    return f"{_titled(paper)} erases {extent} of {_titled(earlier)}; keep one of the two ({what})"


def _edits(a: Part, b: Part) -> Iterator[tuple[str, Value]]:
    """(path, value in b) of every place where b was made otherwise than a, as high as their makers agree."""

    def below(old: Value, new: Value, path: str) -> Iterator[tuple[str, Value]]:
        if old == new:
            return
        if isinstance(old, Part) and isinstance(new, Part) and old.target is new.target:
            ours, theirs = _children(old), _children(new)
            if ours.keys() == theirs.keys():
                for k in ours:
                    yield from below(ours[k], theirs[k], f"{path}.{k}".lstrip("."))
                return
        yield path, new

    return below(a, b, "")


def _full(value: Value) -> Any:
    if isinstance(value, Part):
        return {"make": address(value.target), "given": {k: _full(v) for k, v in _children(value).items()}}
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
def takes(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return {k: p for k, p in inspect.signature(target).parameters.items() if k != "self"}
    except ValueError:
        raise UserError(f"{_name(target)} is written in C and names no arguments; wrap it in a function") from None


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
def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    return {k: _unwritten(p.default) for k, p in takes(target).items() if p.default is not p.empty}


def _unwritten(value: Value) -> Value:
    """A default without marks: nobody wrote it into the tree that takes it in."""
    if isinstance(value, Part):
        return Part(value.target, tuple((k, _unwritten(v)) for k, v in value.kwargs))
    return tuple(map(_unwritten, value)) if isinstance(value, tuple) else value


def _name(target: Any) -> str:
    return getattr(target, "__name__", None) or type(target).__name__


def _titled(paper: Any) -> str:
    return getattr(paper, "title", None) or _name(paper)


def _key(paper: Any) -> str:
    return getattr(paper, "key", None) or _name(paper)


def _show(value: Value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_show(item) for item in value)})"
    return repr(value)
