"""What a user can mend. Anything else is our bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One sentence that names the fix. The shell prints it and exits with code 2."""


class StoreError(UserError):
    """The disk is at fault, not what was to be written there: nothing else can be stored either."""


class DataWarning(UserWarning):
    """One sentence about a user's data: what was left out, or kept in doubt. The shell prints it and goes on."""


RENAMED = {
    "rate": "lr",
    "decay": "weight_decay",
    "clip": "max_grad_norm",
    "outer_rate": "outer_lr",
    "spectral_rate": "spectral_lr",
    "compare_at": "matching_points",
    "learn_at": "loss_points",
    "--rate": "--lr-scale",
    "--lr": "--lr-scale",  # a multiple of the recipe's, never the learning rate itself
}
"""Old name -> new name, of arguments, slots, options and keys that a user may still write."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; it is called 'x' now` for a renamed word, `; did you mean 'x'?` for a close one, else nothing.

    Of a path, such as 'optimizer.rate', the last step may be renamed.
    """
    known = list(known)
    above, dot, last = word.rpartition(".")
    renamed = f"{above}{dot}{RENAMED.get(last, last)}"
    if renamed != word and renamed in known:
        return f"; it is called {renamed!r} now"
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
