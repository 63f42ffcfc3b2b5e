"""Markdown as blocks with the lines they stand on, by markdown-it-py, and the plain text and links of a line."""

import re
from dataclasses import dataclass
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

from deltax.library.identifiers import urls
from deltax.library.model import Link

LONG = 50_000
"""Characters in a line beyond which it is kept and reported but not parsed."""

INLINE = 10_000
BRACKETS = 100
"""Characters, and opening brackets, of a title line beyond which its marks are not interpreted."""

_BOLD_LINE = re.compile(r"\*\*(?!\s)[^*]{1,200}\*\*:?[ \t]*")
_MARKED = re.compile(r"[\\`*_\[\]<>&!~$\n]|://")
_WIKI = re.compile(r"(!?)\[\[([^\[\]|\n]{1,500})(?:\|([^\[\]\n]{0,500}))?\]\]")


@dataclass(frozen=True)
class Block:
    """kind: heading, paragraph, list, item, table, row, or another token's name. Lines [start, end) count from 0.
    `content` is the source of a heading or paragraph; a row's children are its cells."""

    kind: str
    start: int
    end: int
    level: int = 0
    content: str = ""
    children: tuple["Block", ...] = ()


@dataclass(frozen=True)
class Inline:
    """A line without its marks, LaTeX kept, and where it links to. `lead` is the text of a link that opens the line,
    `after` what follows it."""

    text: str
    links: tuple[Link, ...] = ()
    lead: str = ""
    after: str = ""


@lru_cache(maxsize=1)
def _block_parser() -> MarkdownIt:
    return MarkdownIt("js-default", {"maxNesting": 40}).disable(["inline", "text_join", "linkify"])


@lru_cache(maxsize=1)
def _inline_parser() -> MarkdownIt:
    md = MarkdownIt("js-default", {"maxNesting": 20})
    md.normalizeLink = str
    return md.use(dollarmath_plugin, allow_space=True, allow_digits=False, double_inline=True)


def blocks(lines: list[str]) -> tuple[Block, ...]:
    """The block tree. A line of bold text alone at the margin is a heading of level 7, as readers use it: plain
    CommonMark would make it the end of the list above it."""
    source = "\n".join(_for_parser(line) for line in lines)
    return _tree(_block_parser().parse(source))


def _for_parser(line: str) -> str:
    if len(line) > LONG:
        return ""
    return f"###### {line}" if line.startswith("**") and _BOLD_LINE.fullmatch(line) else line


def _tree(tokens: list[Token]) -> tuple[Block, ...]:
    stack: list[tuple[Token | None, list[Block]]] = [(None, [])]
    for token in tokens:
        if token.nesting == 1:
            stack.append((token, []))
        elif token.nesting == -1 and len(stack) > 1:
            opened, children = stack.pop()
            block = _close(opened, children)
            stack[-1][1].extend(block.children if block.kind in ("thead", "tbody") else [block])
        elif token.type == "inline":
            start, end = token.map or (0, 0)
            stack[-1][1].append(Block("inline", start, end, content=token.content))
        else:
            start, end = token.map or (0, 0)
            stack[-1][1].append(Block(token.type, start, end))
    while len(stack) > 1:
        opened, children = stack.pop()
        stack[-1][1].append(_close(opened, children))
    return tuple(stack[0][1])


_KINDS = {"bullet_list": "list", "ordered_list": "list", "list_item": "item", "tr": "row", "th": "cell", "td": "cell"}


def _close(token: Token, children: list[Block]) -> Block:
    name = token.type.removesuffix("_open")
    kind = _KINDS.get(name, name)
    start, end = token.map or ((children[0].start, children[-1].end) if children else (0, 0))
    if kind in ("heading", "paragraph", "cell"):
        content = children[0].content if children else ""
        level = int(token.tag[1]) if kind == "heading" else 0
        if kind == "heading" and level == 6 and _BOLD_LINE.fullmatch(content):
            level = 7
        return Block(kind, start, end, level, content)
    return Block(kind, start, end, children=tuple(children))


@lru_cache(maxsize=1024)
def inline(content: str) -> Inline:
    """Plain text and links of one line of Markdown. Wiki links and bare URLs count as links."""
    if not _MARKED.search(content):
        return Inline(content.strip())
    if len(content) > INLINE or content.count("[") > BRACKETS:
        return Inline(content, tuple(Link(url) for url in urls(content)))
    wiki = {f"\ue000{n}\ue001": match for n, match in enumerate(_WIKI.finditer(content))}
    for mark, match in wiki.items():
        content = content.replace(match[0], mark, 1)
    tokens = _inline_parser().parseInline(content)[0].children or []
    text, links, opened, lead_end = "", [], None, 0
    for token in tokens:
        if token.type == "link_open":
            opened = (str(token.attrGet("href") or ""), len(text))
        elif token.type == "link_close" and opened is not None:
            href, start = opened
            links.append(Link(href, text[start:].strip()))
            if not text[:start].strip():
                lead_end = len(text)
            opened = None
        elif token.type == "math_inline":
            text += f"${token.content}$"
        elif token.type == "math_inline_double":
            text += f"$${token.content}$$"
        elif token.type == "image":
            text += token.content
        elif token.type in ("softbreak", "hardbreak"):
            text += " "
        else:
            text += token.content
            if opened is None:
                found = urls(token.content)
                links += [Link(url) for url in found]
                if found and text.strip() == found[0]:
                    lead_end = len(text)
    lead, after = text[:lead_end].strip(), text[lead_end:]
    for mark, match in wiki.items():
        shown = (match[3] or match[2]).strip()
        text, lead, after = (part.replace(mark, shown) for part in (text, lead, after))
        links.append(Link(match[2].strip(), (match[3] or "").strip(), "embed" if match[1] else "wiki"))
    return Inline(text.strip(), tuple(links), lead, after.strip() if lead else "")


def mentions(lines: list[str]) -> tuple[Link, ...]:
    """Links of nested text, each URL once, in order. Overlong lines are not looked through."""
    found: dict[str, Link] = {}
    for line in lines:
        if len(line) > LONG or not ("://" in line or "[[" in line):
            continue
        for link in inline(line.strip()).links:
            role = link.role if link.role in ("wiki", "embed") else "mention"
            found.setdefault(link.url, Link(link.url, link.label, role))
    return tuple(found.values())


def dedent(lines: list[str]) -> str:
    """Lines joined, less the indent that all that are not blank share; blank lines at both ends are dropped."""
    while lines and not lines[0].strip():
        lines = lines[1:]
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    indent = common_indent(lines)
    return "\n".join(line[len(indent) :] if line.startswith(indent) else "" for line in lines)


def common_indent(lines: list[str]) -> str:
    """The longest run of spaces and tabs that every line which is not blank starts with."""
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line.strip()]
    if not indents:
        return ""
    low, high = min(indents), max(indents)
    size = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:size]
