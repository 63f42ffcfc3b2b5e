"""Measure: train what is missing, compare, verify. Nothing here loads torch before it is used.

`compare` is in `deltax.lab.compare`, and exported by `deltax` itself: here it would hide its own module.
"""

from importlib import import_module
from typing import Any

__all__ = ["Lab", "Store", "verify"]

_LATER = {
    "Lab": "deltax.lab.lab",
    "Store": "deltax.lab.store",
    "verify": "deltax.lab.evidence",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'deltax.lab' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
