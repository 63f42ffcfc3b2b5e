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
_WIKI = re.compile(r"(!?)\[\[([^\[\]|\n]{1,500})(?:\|([^\[\]\n]{0,500}))?\]\](?!\()")
_ANCHOR = re.compile(r"(?<!\\)<a\s[^<>]*?href\s*=\s*[\"']?([^\"'<>\s]*)[\"']?[^<>]*>(.*?)</a\s*>", re.I | re.S)
_STRONG = re.compile(r"(?<!\\)</?(?:b|strong)\s*>", re.I)
_TAG = re.compile(
    r"(?<!\\)</?(?:a|b|i|em|strong|sub|sup|font|span|u|small|big|kbd|p|div|center|details|summary|img|ul|ol|li|h\d|code|"
    r"tt|samp|mark|ins|del|abbr|cite|q|picture|source|table|tbody|thead|tr|td|th)(?:\s[^<>]*)?/?>",
    re.I,
)
_BREAK = re.compile(r"\s*(?<!\\)<br\s*/?>\s*", re.I)
_KEY = re.compile(r"(?<!\\)<kbd>([^<>`]{1,80})</kbd>", re.I)
_LIST_TAG = re.compile(r"<(/?)(ul|ol|li)\b[^<>]*>", re.I)


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
class Part:
    """A stretch of a line of one kind: text, link (with its `url`), code, image, wiki or embed. `bold` and `slanted`
    say how it is set."""

    kind: str
    text: str
    url: str = ""
    bold: bool = False
    slanted: bool = False


@dataclass(frozen=True)
class Inline:
    """A line without its marks, LaTeX kept, and where it links to. `lead` is the text of a link that opens the line,
    `after` what follows it; `parts` are its stretches in order."""

    text: str
    links: tuple[Link, ...] = ()
    lead: str = ""
    after: str = ""
    parts: tuple[Part, ...] = ()


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
        plain = content.strip()
        return Inline(plain, parts=(Part("text", plain),) if plain else ())
    if len(content) > INLINE or content.count("[") > BRACKETS:
        return Inline(content, tuple(Link(url) for url in urls(content)), parts=(Part("text", content),))
    if "<" in content:
        content = _without_html(content)
    wiki: dict[str, re.Match] = {}

    def marked(match: re.Match) -> str:
        mark = f"\ue000{len(wiki)}\ue001"
        wiki[mark] = match
        return mark

    if "[[" in content:
        content = _WIKI.sub(marked, content)
    tokens = _inline_parser().parseInline(content)[0].children or []
    parts: list[Part] = []
    opened: str | None = None
    strong = slanted = 0
    for token in tokens:
        kind, text = "text", token.content
        if token.type == "link_open":
            opened = str(token.attrGet("href") or "")
            parts.append(Part("link", "", opened, strong > 0, slanted > 0))
            continue
        if token.type == "link_close":
            opened = None
            continue
        if token.type.startswith("strong"):
            strong += token.nesting
            continue
        if token.type.startswith("em_"):
            slanted += token.nesting
            continue
        if token.type == "math_inline":
            text = f"${text}$"
        elif token.type == "math_inline_double":
            text = f"$${text}$$"
        elif token.type == "image":
            kind = "image"
        elif token.type == "code_inline":
            kind = "code"
        elif token.type in ("softbreak", "hardbreak"):
            text = " " if opened is not None else "\n"
        if opened is not None:
            last = parts[-1]
            parts[-1] = Part("link", last.text + text, opened, last.bold or strong > 0, last.slanted or slanted > 0)
        elif text:
            parts += _split(kind, text, strong > 0, slanted > 0)
    shown: list[Part] = []
    for part in parts:
        shown += _unmarked(part, wiki)
    return _of_parts(shown)


def _of_parts(parts: list[Part]) -> Inline:
    text = "".join(part.text for part in parts).replace("\n", " ")
    roles = {"link": "own", "wiki": "wiki", "embed": "embed"}
    links = [
        Link(part.url, "" if part.text == part.url else _label(part), roles[part.kind])
        for part in parts
        if part.kind in roles
    ]
    links.sort(key=lambda link: link.role != "own")
    before, lead = "", ""
    after = ""
    for n, part in enumerate(parts):
        if part.kind == "link" and not before.strip():
            lead, after = part.text.strip(), "".join(p.text for p in parts[n + 1 :]).replace("\n", " ").strip()
            break
        before += part.text
    return Inline(text.strip(), tuple(links), lead, after, tuple(parts))


def _label(part: Part) -> str:
    label = part.text.strip()
    return "" if part.kind != "link" and label == part.url else label


def _split(kind: str, text: str, bold: bool, slanted: bool) -> list[Part]:
    """Bare addresses of a text as links of their own."""
    if kind != "text" or "://" not in text:
        return [Part(kind, text, "", bold, slanted)]
    found, at = [], 0
    for url in urls(text):
        start = text.index(url, at)
        if start > at:
            found.append(Part("text", text[at:start], "", bold, slanted))
        found.append(Part("link", url, url, bold, slanted))
        at = start + len(url)
    return [*found, Part("text", text[at:], "", bold, slanted)] if at < len(text) else found


_WIKI_MARK = re.compile("\ue000\\d+\ue001")


def _unmarked(part: Part, wiki: dict[str, re.Match]) -> list[Part]:
    """A part with its wiki links back in place."""
    if "\ue000" not in part.text:
        return [part]
    if part.kind != "text":
        words = _WIKI_MARK.sub(lambda m: _shown(wiki[m[0]]) if m[0] in wiki else m[0], part.text)
        return [Part(part.kind, words, part.url, part.bold, part.slanted)]
    found, at = [], 0
    for mark in _WIKI_MARK.finditer(part.text):
        match = wiki.get(mark[0])
        if match is None:
            continue
        if mark.start() > at:
            found.append(Part("text", part.text[at : mark.start()], "", part.bold, part.slanted))
        kind = "embed" if match[1] else "wiki"
        found.append(Part(kind, _shown(match), match[2].strip(), part.bold, part.slanted))
        at = mark.end()
    return [*found, Part("text", part.text[at:], "", part.bold, part.slanted)] if at < len(part.text) else found


def _shown(match: re.Match) -> str:
    return (match[3] or match[2]).strip()


def _without_html(content: str) -> str:
    """A line whose HTML links, bold words and breaks are Markdown's, less its other tags of layout."""
    content = _ANCHOR.sub(lambda m: f"[{_TAG.sub('', m[2]).strip()}](<{m[1]}>)", content)
    content = _BREAK.sub("\n", _KEY.sub(lambda m: f"`{m[1].strip('` ')}`", content))
    return _TAG.sub("", _STRONG.sub("**", content))


def html_lists(lines: list[str]) -> list[str]:
    """Lines in which HTML lists are Markdown's, each line where it was; the same lines where there are none."""
    if not any("<li" in line or "<LI" in line for line in lines):
        return lines
    depth, out = 0, []
    for line in lines:
        if len(line) > LONG or "<" not in line:
            out.append("  " * depth + line.strip() if depth and line.strip() else line)
            continue
        item, before = False, depth
        for match in _LIST_TAG.finditer(line):
            closes, name = bool(match[1]), match[2].lower()
            if name in ("ul", "ol"):
                depth = max(0, depth + (-1 if closes else 1))
            elif not closes and not item:
                item, before = True, depth
        words = _without_html(_LIST_TAG.sub("", line)).replace("\n", " ").strip()
        lead = "  " * max(before - 1, 0) + "- " if item else "  " * before
        inside = before or depth or item
        out.append((lead + words if words else "") if inside else line)
    return out


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
