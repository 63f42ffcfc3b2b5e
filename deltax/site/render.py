"""Page data as HTML. Every page links to its neighbours by relative addresses, so it works from a folder too."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from deltax import __version__

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)
"""What a page may load: its own files. `frame-ancestors` counts only as a header; the server adds it."""
ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
"""For a figure or a report, which is whole in itself: its own styles, and neither scripts nor anything from outside."""


def page(template: str, data: dict[str, Any], *, root: str = "", token: str = "") -> str:
    """A page of the site. `root` leads from the page to the site's folder; with a `token` it can change things."""
    return (
        _environment()
        .get_template(template)
        .render(**data, root=root, token=token, policy=POLICY, version=__version__, here=template.removesuffix(".html"))
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data": data, "number": number, "signed": signed, "words": words}
    return environment


def data(value: Any) -> Markup:
    """JSON that may stand inside a `<script>`: no character of it ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def words(text: str) -> Markup:
    """A sentence of a docstring: what stands between backticks is code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return Markup(escape(text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces))


def number(value: float | None, digits: int = 3) -> str:
    """1234567 -> 1.23M; an absent number is a dash."""
    if value is None:
        return "–"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4g}".replace("-", "−")
