"""Numbers as a reader of papers writes them."""


def millions(count: float) -> str:
    """Two significant digits: 370k, 0.37M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size / 10:
            shown = count / size
            return f"{shown:.2g}{unit}" if shown < 100 else f"{shown:.0f}{unit}"
    return f"{count / 1e3:.2g}k" if count >= 1e3 else f"{count:.0f}"
