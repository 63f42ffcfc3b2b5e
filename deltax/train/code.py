"""The code that a run depends on, definition by definition, so that editing anything else leaves its identity alone.

From a function or class the names it loads are followed: to other definitions of its module, and through imports to
those of other modules of deltax. Docstrings, comments and annotations are left out.
"""

import ast
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

# What these make is a recipe, and a run's identity holds the recipe itself.
_CORE = "recipe paper expression catalog claim contract address moved sqlite whole errors home slots"
CORE = {f"deltax.{name}" for name in _CORE.split()}

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Name:
    """A top-level name of a module; `*` stands for all of them."""

    module: str
    name: str


@dataclass
class Outline:
    """A module as its definitions. `imports` maps a local name to what it stands for; a module has no `name`."""

    defined: dict[str, list[ast.stmt]] = field(default_factory=lambda: defaultdict(list))
    imports: dict[str, Name] = field(default_factory=dict)
    always: list[ast.stmt] = field(default_factory=list)  # statements that bind no name run whenever it is imported


def version(roots: Iterable[Name]) -> str:
    """A hash of every definition that these names reach."""
    return hashlib.sha256(json.dumps(sorted(reached(roots).items())).encode()).hexdigest()[:16]


def reached(roots: Iterable[Name]) -> dict[str, str]:
    """`module:name` -> a hash of the statements that define it, for every name of deltax that these names reach."""
    todo, seen = list(roots), set[Name]()
    found: dict[str, str] = {}
    while todo:
        here = todo.pop()
        if here in seen or here.module in CORE or here.module.partition(".")[0] != "deltax":
            continue
        seen.add(here)
        if (module := outline_of(here.module)) is None:
            continue
        if here.name in module.imports:
            todo.append(_target(module.imports[here.name]))
            continue
        if here.name == "*":
            statements = [s for each in module.defined.values() for s in each]
        else:
            statements = module.defined.get(here.name, [])
        found[f"{here.module}:{here.name}"] = _hash(statements)
        found[f"{here.module}:"] = _hash(module.always)
        for statement in (*statements, *module.always):
            todo += _loads(statement, module, here.module)
    return found


def outline(source: str) -> Outline:
    """The definitions of a module's source."""
    module = Outline()
    for statement in _bare(ast.parse(source)).body:
        is_definition = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        module.imports |= {} if is_definition else dict(_imported(statement))
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        names = list(_bound(statement))
        for name in names:
            module.defined[name].append(statement)
        if not names:
            module.always.append(statement)
    return module


@cache
def outline_of(module: str) -> Outline | None:
    """The outline of a module of deltax by its name; None where there is no such file."""
    path = _file(module)
    return outline(source(path)) if path else None


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _file(module: str) -> Path | None:
    base = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    found = (p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())
    return next(found, None)


def _loads(statement: ast.stmt, module: Outline, here: str) -> Iterator[Name]:
    """The names of deltax that a statement loads. A module's attribute is that one definition of it."""
    lookup = {**module.imports, **dict(_imported(statement))}
    attributes: set[int] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target = lookup.get(node.value.id)
            if target and (whole := _as_module(target)):
                attributes.add(id(node.value))
                yield Name(whole, node.attr)
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and id(node) not in attributes:
            if node.id in lookup:
                yield _target(lookup[node.id])
            elif node.id in module.defined:
                yield Name(here, node.id)


def _target(name: Name) -> Name:
    whole = _as_module(name)
    return Name(whole, "*") if whole else name


def _as_module(name: Name) -> str | None:
    """The module that an imported name stands for, if it is one."""
    full = f"{name.module}.{name.name}" if name.name else name.module
    return full if full.startswith("deltax.") and _file(full) else None


def _imported(statement: ast.stmt) -> Iterator[tuple[str, Name]]:
    for node in ast.walk(statement):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deltax":
            for alias in node.names:
                yield alias.asname or alias.name, Name(node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and alias.name.startswith("deltax."):
                    yield alias.asname, Name(alias.name, "")


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The top-level names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.If | ast.Try | ast.With | ast.For):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without docstrings and annotations."""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree


def _hash(statements: Iterable[ast.stmt]) -> str:
    return hashlib.sha256("\n".join(ast.dump(s) for s in statements).encode()).hexdigest()[:16]
