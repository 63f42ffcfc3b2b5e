"""A reader's Markdown as HTML that is safe to show: no raw HTML, links of known schemes, nothing loaded from elsewhere.

LaTeX stays text in `<span class="math">`; the page's KaTeX draws it, with `trust` off.
"""

import re
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.tasklists import tasklists_plugin

LONGEST, LONGEST_WORD = 20_000, 1_000
"""Characters beyond which a text is shown as it is: rendering takes time that grows faster than the text."""

_WIKI = re.compile(r"!?\[\[([^\[\]\n|]{1,200})(?:\|([^\[\]\n]{1,200}))?\]\]")


def html(text: str, pages: Mapping[str, str] | None = None) -> str:
    """`pages` says where the targets of wiki links are, by name in lower case."""
    if len(text) > LONGEST or re.search(rf"\S{{{LONGEST_WORD}}}", text):
        return f"<pre>{escape(text)}</pre>"
    return _parser().render(text, {"pages": {} if pages is None else pages})


def link(url: str) -> str:
    """The address if a page may link to it (http, https, mailto), else ""."""
    return url if re.match(r"(https?://|mailto:)", url, re.IGNORECASE) else ""


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": True, "breaks": True})
    parser.enable(["table", "strikethrough", "linkify"])
    parser.validateLink = lambda url: bool(link(url))  # type: ignore[method-assign]
    dollarmath_plugin(parser, allow_space=False, allow_digits=False, double_inline=True)
    tasklists_plugin(parser)
    parser.inline.ruler.before("link", "wiki", _wiki)
    parser.add_render_rule("wiki_link", _content)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("math_inline", _math)
    parser.add_render_rule("math_inline_double", _display)
    parser.add_render_rule("math_block", _display)
    return parser


def _wiki(state: StateInline, silent: bool) -> bool:
    """`[[note]]`, `[[note#part|words]]` and the embed `![[note]]`: a link where the note has a page, else its words."""
    matched = _WIKI.match(state.src, state.pos)
    if matched is None:
        return False
    if not silent:
        target = matched[1].partition("#")[0].strip()
        where = state.env.get("pages", {}).get(target.lower())
        token = state.push("wiki_link", "a" if where else "span", 0)
        token.content = f'<a href="{escape(where)}">' if where else '<span class="wiki">'
        token.content += escape((matched[2] or matched[1]).strip()) + ("</a>" if where else "</span>")
    state.pos = matched.end()
    return True


def _content(self: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    return tokens[i].content


def _image(self: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    """Pictures are links: a page loads nothing from elsewhere."""
    src, words = tokens[i].attrGet("src") or "", tokens[i].content or "picture"
    return f'<a href="{escapeHtml(src)}" rel="noopener noreferrer nofollow">{escapeHtml(words)}</a>'


def _link_open(self: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    tokens[i].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, i, options, env)


def _math(self: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    return f'<span class="math">{escapeHtml(tokens[i].content)}</span>'


def _display(self: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
    return f'<span class="math display">{escapeHtml(tokens[i].content)}</span>'
