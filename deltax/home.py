"""Where a user's data is."""

import os
from pathlib import Path


def home() -> Path:
    """$DELTAX_HOME, else ~/.local/share/deltax."""
    return Path(os.environ.get("DELTAX_HOME") or "~/.local/share/deltax").expanduser()
