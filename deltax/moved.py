"""A module that moved to another folder is found under its old name too: `deltax.papers.language.dyt` is
`deltax.papers.language.norm.dyt`, the same module, with a warning that names the new place.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from deltax.address import modules

_FOLDED = ("papers", "parts", "tasks")  # the areas whose files are in folders by family


class OldNames(MetaPathFinder, Loader):
    """Comes last among the finders, so it is asked only for what is not there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        package, _, inside = name.partition(".")
        area, _, stem = inside.partition(".")
        if package != "deltax" or area not in _FOLDED or not stem:
            return None
        found = modules(area).get(stem.rpartition(".")[2], ())
        return ModuleSpec(name, self, origin=found[0]) if len(found) == 1 and found[0] != name else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, str(module.__spec__ and module.__spec__.origin)
        warnings.warn(f"{old} is {new} now; import it from there", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
