"""Recipes as they are written at the shell: `gpt+rope+dyt(alpha=0.8)+muon`."""

import ast
import importlib
import inspect
import re
from types import NoneType, UnionType
from typing import Any, get_args

from deltax import catalog
from deltax.errors import UserError
from deltax.paper import Paper, paper_of
from deltax.recipe import Part, takes

_EXAMPLE = "write it like 'gpt+rope+dyt(alpha=0.8)'"


def recipe(expression: str, settings: tuple[str, ...] | list[str] = ()) -> Part:
    """The recipe an expression stands for, with leaves set by `path=value` words.

    Raises UserError for unknown papers, arguments and paths, each with the nearest known one.
    """
    terms = [term.strip() for term in _split(expression)]
    first, *changes = terms
    found = _term(first)
    if not isinstance(found, Part):
        known = catalog.papers()
        whole = catalog.shown_on(known[first.partition("(")[0].strip()], known)
        raise UserError(f"{first} is a change to a recipe, not a recipe; start with one, as in '{whole}+{first}'")
    root: Part = found
    for change in changes:
        root = root + _term(change)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes path=value, not {setting!r}")
        root = _put(root, path.strip(), _value(text.strip()))
    return root


def load(key: str) -> Any:
    """What a paper's file declares: a recipe, or a `Paper`. Raises UserError for an unknown key."""
    record = catalog.find(key)
    module = importlib.import_module(record.module)
    return getattr(module, record.function)


def delta(text: str) -> Paper:
    """A change as it is written in a recipe, `dyt(alpha=0.8)`. Raises UserError for a recipe or a procedure."""
    found = _term(text.strip())
    if isinstance(found, Part):
        raise UserError(f"{text} is a recipe, not a change to one")
    change: Paper = found
    return change


def _term(text: str) -> Any:
    matched = re.fullmatch(r"([\w-]+)\s*(\(.*\))?", text, re.DOTALL)
    if not matched:
        raise UserError(f"cannot read {text!r} in a recipe; {_EXAMPLE}")
    key, arguments = matched.groups()
    found = load(key)
    if isinstance(found, Paper) and found.kind == "procedure":
        raise UserError(f"{key} is a procedure, not part of a recipe; see 'dx show {key}' for what it does")
    if not arguments:
        return found
    paper, options = paper_of(found), _options(text, arguments)
    chosen = paper(**options)
    for name, parameter in takes(paper.function).items():
        if name in options:
            _check(f"{key}'s {name}", parameter, parameter.default, options[name])
    return chosen


def _options(text: str, arguments: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"_{arguments}", mode="eval").body
    except SyntaxError:
        raise UserError(f"cannot read {text!r} in a recipe; {_EXAMPLE}") from None
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise UserError(f"{text}: name every argument, as in 'dyt(alpha=0.8)'")
    try:
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except ValueError:
        raise UserError(f"{text}: arguments are numbers, words in quotes, or lists of these") from None


def _split(expression: str) -> list[str]:
    """At the pluses outside brackets and quotes."""
    terms, depth, quote = [""], 0, ""
    for letter in expression:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "+" and depth == 0 and not quote:
            terms.append("")
        else:
            terms[-1] += letter
    if depth or quote:
        raise UserError(f"a bracket or quote of {expression!r} is not closed; {_EXAMPLE}")
    return terms


def _put(root: Part, path: str, value: Any) -> Part:
    changed = root.put(path, value)
    above, _, name = path.rpartition(".")
    _check(path, takes((root[above] if above else root).target)[name], root[path], value)
    return changed


def _check(what: str, parameter: inspect.Parameter, usual: Any, value: Any) -> None:
    """Raises UserError for a value that is not of the kind that the parameter's annotation names."""
    if isinstance(usual, Part):
        raise UserError(f"{what} is a part, {usual!r}, not a value; papers change it, as in 'gpt+dyt'")
    said = parameter.annotation
    kinds = set(get_args(said)) if isinstance(said, UnionType) else {said}
    if value is None or not kinds <= {int, float, NoneType}:
        return
    number, fits = ("a number", int | float) if float in kinds else ("a whole number", int)
    example = f", such as {usual!r}" if isinstance(usual, int | float) else ""
    if isinstance(value, bool) or not isinstance(value, fits):
        raise UserError(f"{what} is {number}{example}, not {value!r}")
    if isinstance(usual, int) and isinstance(value, int) and usual >= 0 > value:
        raise UserError(f"{what} counts something{example}: at least 0, not {value!r}")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
