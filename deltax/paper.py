"""A paper is a Y with a date and parents.

`@paper` reads the kind of Y off the function it decorates:

- `def dyt(recipe, *, alpha=0.5) -> Part` is a *delta*: `gpt + dyt`, `gpt + dyt(alpha=0.3)`;
- `def gpt(*, depth=4) -> Part`, all arguments optional, is a *recipe*: the name stands for the tree itself;
- anything else is a *procedure* (a decoder, a probe, a law, a kernel) and is called as it is written.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from deltax.errors import UserError, nearest
from deltax.recipe import AppliedPaper, Part


@dataclass(frozen=True, eq=True)
class Paper:
    """A published change. `on` is its X: a recipe, a paper, or a tuple of these.

    `whole` is the recipe that a delta is shown on, as written at the shell, where that is neither its X nor gpt.
    `replaces` are the deltas in whose place this one stands: after them it may take over what they wrote.
    `trains` is whether it has a gradient: what has none is for models that are trained already.
    """

    function: Callable[..., Any]
    year: int
    on: Any = field(default=None, compare=False, repr=False)
    arxiv: str | None = None
    url: str | None = None
    whole: str | None = field(default=None, compare=False, repr=False)
    options: tuple[tuple[str, Any], ...] = ()
    trains: bool = field(default=True, compare=False, repr=False)
    replaces: "tuple[Paper, ...]" = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            object.__setattr__(self, attribute, getattr(self.function, attribute))

    @property
    def key(self) -> str:
        """The file's name with dashes, the same in the catalogue, the shell and `evidence/`."""
        return self.function.__module__.rpartition(".")[2].replace("_", "-")

    @property
    def kind(self) -> str:
        """ "delta", "recipe" or "procedure"."""
        return kind([(p.name, p.default is not p.empty) for p in _parameters(self.function)], self.function)

    @property
    def title(self) -> str:
        chosen = ", ".join(f"{k}={v!r}" for k, v in self.options)
        return f"{self.key}({chosen})" if chosen else self.key

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A delta given a recipe rewrites it; given options alone it is the same paper, its mind made up."""
        if self.kind == "procedure":
            return self.function(*args, **options)
        known = [p.name for p in _parameters(self.function) if p.name != "recipe"]
        for word in options:
            if word not in known:
                raise UserError(f"{self.key} takes no {word!r}{nearest(word, known)}")
        options = {**dict(self.options), **options}
        if self.kind == "recipe":
            made = self.function(**options)
            return replace(made, history=(AppliedPaper(replace(self, options=tuple(options.items()))),))
        if args:
            return self.function(*args, **options)
        return replace(self, options=tuple(options.items()))

    def apply(self, module: Any, /, *, where: Any = None, skip: Any = None, example: Any = None, **options: Any) -> Any:
        """Rewrite a living `torch.nn.Module` in place of the parts it fills, and return it.

        `where` and `skip` choose parts by a name with wildcards, a slot, or a layer index; `example` is an input of the
        module, where none can be found for the check. `deltax.applied(module)` lists what was replaced. Works where the
        Y is a drop-in part; raises UserError where it is not, where the module has no such part, or where a check
        fails, and leaves the module as it was.
        """
        from deltax.parts.rewriting.surgery import apply  # the core never loads torch

        delta = self(**options) if options else self
        return apply(delta, module, where=where, skip=skip, example=example)


def paper(
    *,
    year: int,
    on: Any = None,
    arxiv: str | None = None,
    url: str | None = None,
    whole: str | None = None,
    trains: bool = True,
    replaces: "Paper | tuple[Paper, ...]" = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Declare a module's Y. See the module docstring for the three kinds."""

    def declare(function: Callable[..., Any]) -> Any:
        taken = replaces if isinstance(replaces, tuple) else (replaces,)
        declared = Paper(function, year, on, arxiv, url, whole, trains=trains, replaces=taken)
        if taken and {declared.kind, *(getattr(x, "kind", "no paper") for x in taken)} != {"delta"}:
            raise UserError(f"{declared.key} declares replaces={replaces!r}; only a delta replaces, and only deltas")
        return declared() if declared.kind == "recipe" else declared

    return declare


def kind(parameters: list[tuple[str, bool]], function: Any) -> str:
    """The kind of Y from its (name, has default) parameters and return annotation; the catalogue asks this too."""
    if parameters and parameters[0][0] == "recipe":
        return "delta"
    returns = function if isinstance(function, str) else function.__annotations__.get("return")
    named = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
    return "recipe" if named == "Part" and all(optional for _, optional in parameters) else "procedure"


def paper_of(thing: Any) -> Paper:
    """The paper behind a recipe's name, or the paper itself."""
    if isinstance(thing, Part) and thing.history:
        thing = thing.history[-1].paper
    if not isinstance(thing, Paper):
        raise UserError(f"{thing!r} is not a paper")
    return thing


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())
