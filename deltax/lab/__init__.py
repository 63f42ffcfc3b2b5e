"""Measure: train what is missing, compare, verify. Nothing here loads torch before it is used."""

from importlib import import_module
from typing import Any

__all__ = ["Lab", "Store"]

_LATER = {"Lab": "deltax.lab.lab", "Store": "deltax.lab.store"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'deltax.lab' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
