"""What an argument may be: refused where it is given, by its name and value, not by NaN or a traceback later."""

from deltax.errors import UserError


def at_least(least: float, **given: float) -> None:
    """Raise UserError for the first argument below `least`, or that is NaN."""
    for name, value in given.items():
        if not value >= least:
            raise UserError(f"{name} is at least {least:g}, not {value!r}")


def above(low: float, **given: float) -> None:
    """Raise UserError for the first argument that is not above `low`."""
    for name, value in given.items():
        if not value > low:
            raise UserError(f"{name} is above {low:g}, not {value!r}")


def between(low: float, high: float, **given: float) -> None:
    """Raise UserError for the first argument outside of [low, high]."""
    for name, value in given.items():
        if not low <= value <= high:
            raise UserError(f"{name} is from {low:g} to {high:g}, not {value!r}")


def below(low: float, high: float, **given: float) -> None:
    """Raise UserError for the first argument outside of [low, high)."""
    for name, value in given.items():
        if not low <= value < high:
            raise UserError(f"{name} is at least {low:g} and below {high:g}, not {value!r}")
