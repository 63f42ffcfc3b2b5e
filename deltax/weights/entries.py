"""Reading the state dict of another library: each entry is read, or left behind by a stated name, or refused."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deltax.errors import UserError


class Entries:
    """The entries of the state dict of a `model`, each taken once; at the end of a `with` block none may be left.

    A `prefix` that some names have is removed from them. A pattern is a whole name, in which `*` is a number, `{a,b}`
    is a or b, and `**` is anything. Raises UserError with the names that remain, and for a name that is missing.
    """

    def __init__(self, state: Mapping[str, Tensor], model: str, *, prefix: str = ""):
        self.model = model
        self._rest: dict[str, Tensor] = {}
        self._given: dict[str, str] = {}
        for name, value in state.items():
            short = name.removeprefix(prefix)
            if short in self._rest:
                raise UserError(f"the state dict has both {self._given[short]!r} and {name!r}: remove one of them")
            self._rest[short], self._given[short] = value, name

    def take(self, name: str) -> Tensor:
        """The value of this entry."""
        if name not in self._rest:
            raise UserError(
                f"the state dict has no {name!r}, and that of a {self.model} has: give its whole state dict"
            )
        return self._rest.pop(name)

    def matching(self, *patterns: str) -> dict[str, Tensor]:
        """All entries whose names match one of the patterns, in the order of the state dict."""
        compiled = [_compiled(p) for p in patterns]
        names = [name for name in self._rest if any(p.fullmatch(name) for p in compiled)]
        return {name: self._rest.pop(name) for name in names}

    def leave(self, *patterns: str) -> None:
        """Leave out the entries whose names match one of the patterns."""
        self.matching(*patterns)

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def __enter__(self) -> "Entries":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None and self._rest:
            names = [self._given[name] for name in self._rest]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"the weight map of {self.model} does not read {shown}: remove what our model has no part for"
            )


def under(prefix: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """The patterns of what lies under a prefix."""
    return tuple(prefix + pattern for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    words = {r"\*\*": ".*", r"\*": r"\d+", r"\{": "(?:", r"\}": ")", ",": "|"}
    escaped = re.escape(pattern)
    for word, meaning in words.items():
        escaped = escaped.replace(word, meaning)
    return re.compile(escaped)
