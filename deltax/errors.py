"""What a user can mend. Anything else is our bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One sentence that names the fix. The shell prints it and exits with code 2."""


class StoreError(UserError):
    """The disk is at fault, not what was to be written there: nothing else can be stored either."""


class DataWarning(UserWarning):
    """One sentence about a user's data: what was left out, or kept in doubt. The shell prints it and goes on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
