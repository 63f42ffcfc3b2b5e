"""X, but with Y: machine-learning papers as rewrites that add up.

    from deltax import recipe, compare
    from deltax.papers.language.models.gpt import gpt
    from deltax.papers.language.norm.dyt import dyt

    gpt + dyt                    # a recipe: a value, a tree of parts
    dyt.apply(my_module)         # the same Y on a living torch.nn.Module
    compare(gpt, gpt + dyt)      # a fair experiment

Importing deltax loads neither torch nor any paper.
"""

from typing import Any

from deltax import moved
from deltax.claim import Claim, Verdict, claim
from deltax.errors import UserError
from deltax.expression import recipe
from deltax.paper import Paper, paper
from deltax.recipe import Part, diff, part

__all__ = [
    "Claim",
    "Paper",
    "Part",
    "UserError",
    "Verdict",
    "applied",
    "claim",
    "compare",
    "diff",
    "paper",
    "part",
    "recipe",
    "verify",
]
__version__ = "0.1.0"

moved.install()

# By module: `deltax.lab.compare` is a file of that package, so its name there cannot stand for the function.
_LATER = {"applied": "deltax.parts.rewriting.surgery", "compare": "deltax.lab.compare", "verify": "deltax.lab.verify"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'deltax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
