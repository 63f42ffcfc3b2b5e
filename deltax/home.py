"""Where a user's data is, and what can be thrown away."""

import os
from pathlib import Path


def home() -> Path:
    """$DELTAX_HOME, else ~/.local/share/deltax."""
    return Path(os.environ.get("DELTAX_HOME") or "~/.local/share/deltax").expanduser()


def cache() -> Path:
    """$XDG_CACHE_HOME/deltax, else ~/.cache/deltax: all of it is made again when it is gone."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deltax"
