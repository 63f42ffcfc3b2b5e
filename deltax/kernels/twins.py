"""A fast twin declares beside its definition what it is a twin of; it is found there by syntax, and loaded when taken.

@twin("papers.softmax_attention:attend", on="cuda", why="chosen for each shape when it is called")
def auto(q, k, v, rules=None): ...
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from deltax.address import address

_T = TypeVar("_T")


@dataclass(frozen=True)
class Twin:
    """A definition of `module` called `name` that computes what the one at the address `of` does, where `on` says:
    "cpu", "cuda", "triton" (a GPU with Triton installed) or "any".
    """

    of: str
    on: str
    why: str
    module: str
    name: str

    def runs_on(self, device: str) -> bool:
        if self.on == "triton":
            return device == "cuda" and find_spec("triton") is not None
        return self.on in ("any", device)

    def load(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.name)


def twin(of: str, *, why: str, on: str = "any") -> Callable[[_T], _T]:
    """Declare a twin of the reference at this address. The declaration is read off the file; nothing is registered."""
    return lambda made: made


def twins_of(make: Callable[..., Any]) -> tuple[Twin, ...]:
    """The twins of a reference, those of one device before those of any."""
    return _declared().get(address(make), ())


@cache
def _declared() -> dict[str, tuple[Twin, ...]]:
    found: dict[str, list[Twin]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "twin":
                    words = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                    of = ast.literal_eval(call.args[0])
                    each = Twin(of, words.get("on", "any"), words["why"], f"{__package__}.{path.stem}", node.name)
                    found.setdefault(of, []).append(each)
    return {of: tuple(sorted(twins, key=lambda t: t.on == "any")) for of, twins in found.items()}
