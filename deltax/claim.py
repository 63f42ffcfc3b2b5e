"""A claim is a sentence that runs.

`@claim` marks an exact claim: an identity, checked in every test run. `@claim.parity(peer=...)` marks one checked
against an implementation nobody here wrote. `@claim.measured(paper=...)` marks one that trains or times something: its
function is handed the lab and returns a `Verdict`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal[
    "supported at this scale",
    "not seen at this scale",
    "opposite at this scale",
    "inconclusive",
    "not testable here",
]


@dataclass(frozen=True)
class Verdict:
    """What a measured claim came to: an outcome, an interval, and the scale at which it was seen.

    `could_have_seen` is the smallest effect this measurement would have noticed, in the unit of `estimate`.
    `numbers` holds whatever else was measured, and `figures` maps a caption to an SVG.
    """

    outcome: Outcome
    scale: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    unit: str = ""
    could_have_seen: float | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text: str = self.outcome
        if self.could_have_seen is not None and self.outcome in ("not seen at this scale", "inconclusive"):
            text += f" (could have seen at least {self.could_have_seen:.3g}{_spaced(self.unit)})"
        if self.estimate is not None and math.isfinite(self.estimate):
            text += f": {self.estimate:+.4g}{_spaced(self.unit)}"
        if self.interval is not None:
            text += f" [{self.interval[0]:+.4g}, {self.interval[1]:+.4g}]"
        return f"{text}, at {self.scale}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """A checked sentence of a paper. `paper` is what the paper reports; `peer` is who it is checked against."""

    check: Callable[..., Any]
    kind: Literal["exact", "parity", "measured"]
    paper: str = ""
    peer: str = ""

    def __post_init__(self) -> None:
        if not (self.check.__doc__ or "").strip():
            raise TypeError(f"{self.check.__qualname__}: a claim is a sentence; write it as the docstring")

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def says(self) -> str:
        return " ".join((self.check.__doc__ or "").split("\n\n")[0].split())

    def __call__(self, *args: Any) -> Any:
        return self.check(*args)


class _Declare:
    """`@claim`, `@claim.parity(peer=...)`, `@claim.measured(paper=...)`."""

    def __call__(self, check: Callable[[], None]) -> Claim:
        return Claim(check, "exact")

    def parity(self, *, peer: str) -> Callable[[Callable[[], None]], Claim]:
        """Checked against `peer`, imported inside the claim: peers are installed for tests only."""
        return lambda check: Claim(check, "parity", peer=peer)

    def measured(self, *, paper: str) -> Callable[[Callable[[Any], Verdict]], Claim]:
        """`paper` is the figure the paper reports, with its table, or the sentence it states."""
        return lambda check: Claim(check, "measured", paper=paper)


claim = _Declare()


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""
