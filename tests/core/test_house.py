"""Imports go one way: core <- parts, tasks <- papers <- weights, claims, kernels <- train <- lab <- shell and pages."""

import ast
import sys
from pathlib import Path

import pytest

import deltax
from deltax import catalog
from deltax.home import home
from deltax.slots import SLOTS

HOUSE = Path(deltax.__file__).parent
_CORE = "address catalog claim contract errors expression home moved paper recipe slots sqlite whole"
CORE = set(_CORE.split())
FLOORS = {
    **dict.fromkeys(CORE, 0),
    "shapes": 0,
    "parts": 1,
    "tasks": 1,
    "papers": 2,
    "weights": 3,
    "claims": 3,
    "kernels": 3,
    "train": 4,
    "lab": 5,
    "library": 1,
    "site": 6,
    "cli": 7,
    "__main__": 8,
}
# The only steps up: what a name promises and a later floor keeps, imported when it is called.
LATE = {("paper", "parts")}


def imports(path: Path, everywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" if node.module == "deltax" else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(p for p in HOUSE.rglob("*.py") if p != HOUSE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_go_one_way(path):
    here = path.relative_to(HOUSE).with_suffix("").parts[0]
    for module in imports(path, everywhere=True):
        if module.startswith("deltax."):
            there = module.split(".")[1]
            if there in FLOORS and (here, there) not in LATE:
                assert FLOORS[there] <= FLOORS[here], f"{here} imports {module}"


def test_a_paper_imports_no_later_paper():
    known = catalog.papers()
    for record in known.values():
        later = [key for key in record.imports if known[key].year > record.year]
        assert not later, f"{record.key} ({record.year}) imports {', '.join(later)}: move the helper to parts"


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_is_the_standard_library(name):
    for module in imports(HOUSE / f"{name}.py", everywhere=False):
        top = module.split(".")[0]
        assert top == "deltax" or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_every_slot_that_is_filled_is_in_the_glossary():
    """Every slot named in a verb, and every constructor argument that holds a part, is documented in `slots.py`."""
    used = {}
    for path in FILES:
        if path.relative_to(HOUSE).parts[0] not in ("parts", "papers"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("fill", "wrap")
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    used[first.value] = path.name
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                words = node.args.args + node.args.kwonlyargs
                used |= {w.arg: path.name for w in words if w.annotation and ast.unparse(w.annotation) == "Part"}
    assert not {slot: where for slot, where in used.items() if slot not in SLOTS}


def test_there_is_one_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, is_ in (("~/here", tmp_path / "here"), ("", tmp_path / ".local/share/deltax"), ("/a", Path("/a"))):
        monkeypatch.setenv("DELTAX_HOME", given)
        assert home() == is_
    asking = [str(path.relative_to(HOUSE)) for path in FILES if 'environ.get("DELTAX_HOME")' in path.read_text()]
    assert asking == ["home.py"]
