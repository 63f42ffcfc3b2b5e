"""A file about one paper, or a section about one: its properties, however they are written, and its entry.

Properties stand in front matter, as `key:: value` (Logseq, Dataview, also in callouts), as lines `Key: value` or
bullets `- **Key:** value` below the title (Notion, Zotero), as definitions, or as `#+key: value`. Whether a file is a
page is decided before anything in it is read as a list.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from deltax.library import days, frontmatter, lines, names, tables, tasks
from deltax.library.frontmatter import FrontMatter
from deltax.library.identifiers import from_fields, from_text, from_url, unique, year_of
from deltax.library.markdown import LONG, Block, dedent, inline, mentions
from deltax.library.model import Dates, Entry, Link, Origin, Reference, Task

_KEYS = {
    "title": "title", "paper": "link", "paper title": "title", "full title": "title", "papertitle": "title",
    "author": "authors", "authors": "authors", "author(s)": "authors",
    "firstauthor": "authors", "first author": "authors",
    "year": "year", "date": "date", "published": "date", "publication date": "date", "publication year": "year",
    "pubdate": "date", "publishdate": "date", "issued": "date", "venue": "venue", "journal": "venue",
    "conference": "venue", "published in": "venue", "publication": "venue", "container-title": "venue",
    "publicationtitle": "venue", "publication title": "venue", "booktitle": "venue",
    "url": "link", "link": "link", "links": "link", "source": "link", "pdf": "link", "paper link": "link",
    "paper url": "link", "link to paper": "link", "arxiv link": "link", "openreview": "link", "website": "aside",
    "arxiv": "arxiv", "arxiv id": "arxiv", "arxiv_id": "arxiv", "arxiv-id": "arxiv", "arxivid": "arxiv",
    "eprint": "arxiv", "doi": "doi", "status": "status", "state": "status", "reading status": "status",
    "read": "status",
    "tags": "tags", "tag": "tags", "keywords": "tags", "topics": "tags", "citekey": "citekey", "cite key": "citekey",
    "citation key": "citekey", "itemtype": "kind", "item type": "kind", "code": "aside", "github": "aside",
    "aliases": "aliases", "alias": "aliases", "dateread": "read on", "date read": "read on", "read on": "read on",
}  # fmt: skip
"""Names of properties, and what they are here."""

_LINE = re.compile(
    r"^\s*(?:>\s*)*(?:[-*+]\s+)?(?:\*\*|__|\*|_)?(?P<key>[A-Za-z][A-Za-z()_\- ]{1,24}?)(?:\*\*|__|\*|_)?\s*"
    r"(?P<colons>::|[:：])(?:\*\*|__|\*|_)?(?:\s+(?P<value>\S.*?))?\s*$"
)
_ORG = re.compile(r"^(?:#\+|:)(?P<key>[A-Za-z_]{2,24}):\s+(?P<value>.+?)\s*$")
_HEAD = 40
"""Lines from the first in which `Key: value` is looked for."""

_GENERIC = re.compile(
    r"(?i)(?:notes?|summary|abstract|papers?|paper title|metadata|paper notes?|introduction|overview|"
    r"contents?|reading notes?|literature "
    r"notes?|index|home|readme|tl;?dr|untitled|my notes?|links?|references?)"
)
SECTIONS = re.compile(
    r"(?i)(?:\d+[.)]?\s*)?(?:abstract|introduction|background|motivation|overview|summary|tl;?dr:?|"
    r"key (?:points?|ideas?|insights?|"
    r"takeaways?|contributions?|findings?|concepts?)|main (?:points?|ideas?|contributions?|results?)|"
    r"approach|(?:the )?methods?|"
    r"methodology|model|architecture|algorithm|experiments?|results?|evaluation|discussion|limitations?|conclusions?|"
    r"related work|references|bibliography|thoughts?|my (?:thoughts?|take|notes?|comments?)|comments?|"
    r"notes?|questions?|"
    r"open questions?|critique|criticisms?|pros|cons|strengths?|weaknesses?|ideas?|details|takeaways?|"
    r"contributions?|analysis|"
    r"problem(?: statement)?|solution|setup|datasets?|training|inference|future work|follow[- ]?ups?|"
    r"quotes?|highlights?|"
    r"annotations?|metadata|citation|bibtex|links?|resources|appendix|implementation|code|further reading|see also|"
    r"(?:what|why|how)(?: (?:is|are|does|do|did|was|it|this|the|i|we|they)\b[^A-Z]{0,40})?\?|to-?dos?|"
    r"tasks|next steps|table of contents|contents|toc)\s*:?"
)
"""Headings of the parts of one paper's notes."""

_READ_TAGS = {
    "readdone": "done",
    "read": "done",
    "done": "done",
    "finished": "done",
    "toread": "todo",
    "to-read": "todo",
}
_READ_TAGS |= {
    "unread": "todo",
    "reading": "doing",
    "status/read": "done",
    "status/done": "done",
    "status/toread": "todo",
}
_READ_TAGS |= {"status/to-read": "todo", "status/reading": "doing", "readinglist": "todo", "tbr": "todo"}


@dataclass
class Facts:
    """Properties of a page: values by what they are here, and from where. `own` are those that are not front matter;
    `repeated` those that several lines give, as a list of papers does."""

    values: dict[str, list[str]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    colons: set[str] = field(default_factory=set)
    count: dict[str, int] = field(default_factory=dict)

    def first(self, key: str) -> str:
        return next(iter(self.values.get(key, ())), "")

    def add(self, key: str, values: Iterable[str]) -> None:
        there = self.values.setdefault(key, [])
        there += [value for value in values if value and value not in there]

    def repeated(self) -> bool:
        return any(self.count.get(key, 0) > 1 for key in ("title", "link", "date", "year", "venue")) and (
            self.count.get("title", 0) > 1 or self.count.get("authors", 0) > 2 or self.count.get("link", 0) > 2
        )


def facts(front: dict[str, Any], rows: list[str], start: int = 0, end: int | None = None, head: int = _HEAD) -> Facts:
    """The properties of front matter and of lines [start, end)."""
    found = Facts()
    for key, value in front.items():
        here = _KEYS.get(str(key).casefold().strip())
        if here and value not in (None, "") and not isinstance(value, dict):
            found.add(here, _several(here, value))
    end = len(rows) if end is None else end
    for number in range(start, min(end, start + 400)):
        row = rows[number]
        if ":" not in row or len(row) > 2000:
            continue
        match = _LINE.match(row) or _ORG.match(row)
        if match is None:
            if row.startswith(": ") and number and (here := _KEYS.get(rows[number - 1].strip().casefold())):
                found.add(here, _several(here, row[1:].strip()))
                found.own.add(here)
            continue
        here = _KEYS.get(match["key"].strip().casefold())
        double = match.re is _LINE and match["colons"] == "::"
        if here is None or (number >= start + head and not double):
            continue
        value = (match["value"] or "").strip()
        if (
            match.re is _LINE
            and not double
            and "*" not in row[: match.end("key") + 4]
            and here == "title"
            and len(value) < 3
        ):
            continue
        if double and here == "title":
            found.colons.add("title")
        found.count[here] = found.count.get(here, 0) + 1
        if value:
            found.add(here, _several(here, value))
            found.own.add(here)
    return found


def told(row: str) -> bool:
    """Whether a line gives a property of a paper: `Authors: ...`."""
    match = _LINE.match(row)
    return match is not None and match["key"].strip().casefold() in _KEYS


def _several(key: str, value: Any) -> list[str]:
    """The values of a property: names and tags part at commas, a title or a link does not."""
    if isinstance(value, list) or key == "tags":
        words = value.split() if isinstance(value, str) and "#" in value and "," not in value else value
        return [text.lstrip("#").strip() for text in frontmatter.strings(words)]
    text = str(value).strip()
    if key == "link":
        return [link.url for link in inline(text).links] or [text]
    text = frontmatter.unwiki(text)
    return [text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text]


def decided(path: str, rows: list[str], front: FrontMatter, tree: tuple[Block, ...]) -> Entry | None:
    """The entry of a file that says of itself that it is about one paper; None where it may be a list."""
    found = facts(front.values, rows, front.lines)
    if found.repeated():
        return None
    ids = _ids(found)
    titled = found.first("title") or _first_heading(tree)
    described = bool(front.values) and bool(ids) and bool(set(found.values) & {"title", "arxiv", "doi", "link"})
    named = bool(found.first("title")) and bool(found.values.get("authors"))
    about = (
        bool(titled)
        and bool(found.own & {"authors", "link", "arxiv", "doi", "venue"})
        and bool(ids or "authors" in found.own)
    )
    labelled = bool(found.first("title")) and _own_label(rows, front.lines)
    keyed = bool(found.first("citekey") or found.first("kind")) and bool(titled or found.values.get("aliases"))
    logseq = "title" in found.colons and bool(ids or found.own & {"authors", "link", "status"})
    if not (described or named or about or keyed or logseq or labelled):
        return None
    if not (described or keyed or logseq) and _lists(tree) > 4:
        return None
    return entry(path, rows, front, tree, found)


_PAPER_LABEL = re.compile(r"(?i)^\s*(?:[-*+]\s+)?\[(?:link to (?:the )?)?(?:original )?paper(?: link)?\]\(\S*\)\s*$")


def _own_label(rows: list[str], start: int) -> bool:
    """Whether just one line of a file that has a title is only the link to "the paper"."""
    return sum("](" in row and len(row) < 2000 and bool(_PAPER_LABEL.match(row)) for row in rows[start:]) == 1


def _lists(tree: tuple[Block, ...]) -> int:
    """How many items and rows of the file open with the title of a paper and its link."""
    count = 0
    for block in tree:
        if block.kind == "list":
            for item in block.children:
                first = item.children[0].content if item.children and item.children[0].kind == "paragraph" else ""
                if "://" in first:
                    head = lines.parse(inline(first))
                    count += head.papers and not lines.is_label(head.title)
        elif block.kind == "heading" and "://" in block.content:
            count += any(from_url(link.url) for link in inline(block.content).links)
    return count


def _first_heading(tree: tuple[Block, ...]) -> str:
    top = next((block for block in tree if block.kind == "heading"), None)
    return inline(top.content).text if top and top.level < 7 else ""


def weighed(
    path: str, rows: list[str], front: FrontMatter, tree: tuple[Block, ...], entries: list[Entry], reading: re.Pattern
) -> Entry | None:
    """The entry of a file that is about one paper after all, from what its blocks hold; None for a list, or neither.
    `entries` are those that the file has when it is read as a list; `reading` finds the words of a list's name."""
    top = next((block for block in tree if block.kind != "hr"), None)
    if top is None:
        return None
    heading = top.kind == "heading" and top.level < 7
    opening = lines.parse(inline(top.content)) if heading else _opening(top)
    leads = bool(opening and opening.papers and opening.title and not lines.is_label(opening.title))
    told = str(front.values.get("title") or "")
    post = lines.is_title(told) and not reading.search(told) and not any(e.task.symbol for e in entries)
    if entries and post and len(entries) < 8:
        taken = sum(e.origin.end - e.origin.line + 1 for e in entries if not e.origin.within)
        if taken * 4 <= len(rows) - front.lines and any(
            lines.leads_to_paper(k.url, k.label) for k in mentions(rows[front.lines :])
        ):
            return entry(path, rows, front, tree, facts(front.values, rows, front.lines))
    if entries and not leads:
        return None
    papers = [
        e for e in entries if any(lines.leads_to_paper(k.url, k.label) for k in e.reference.links if k.role == "own")
    ]
    if len(papers) > 4:
        return None
    found = facts(front.values, rows, front.lines)
    ids = unique(from_url(link.url) for link in mentions(rows[front.lines :]))
    heads = [block for block in tree if block.kind == "heading" and block.level < 7]
    first = heads[0] if heads and heads[0] is top else None
    boxes = sum(bool(e.task.symbol) for e in entries)
    if leads:
        others = [e for e in papers if e.origin.line != top.start + 1]
        equals = [h for h in heads if h is not first and h.level <= (first.level if first else 7)]
        under = first is None or all(SECTIONS.fullmatch(inline(h.content).text.strip()) for h in equals) or not equals
        lone = first is not None or (len(ids) == 1 and (len(rows) > top.end + 2 or "\n" in top.content))
        if lone and not others and not boxes and under and (first is not None or not entries[1:]):
            return entry(path, rows, front, tree, found)
        if (
            first is not None
            and first.level == 1
            and sum(h.level == 1 for h in heads) == 1
            and len(others) < 4
            and under
        ):
            return entry(path, rows, front, tree, found)
        return None
    if entries:
        return None
    if found.first("title") and len(ids) >= 1 and not found.repeated():
        labelled = _labelled(rows[front.lines :])
        if len(ids) == 1 or labelled:
            return entry(path, rows, front, tree, found)
    if len(ids) == 1 or (first and _skeleton(first, heads, rows)):
        return entry(path, rows, front, tree, found)
    if first and first.level == 1 and sum(h.level == 1 for h in heads) == 1:
        after = tree[tree.index(first) + 1] if tree.index(first) + 1 < len(tree) else None
        if after and after.kind == "paragraph" and lines.are_people(_people_line(after.content)):
            return entry(path, rows, front, tree, found)
        if _labelled(rows[first.end : first.end + 6]):
            return entry(path, rows, front, tree, found)
    return None


_PARTS = re.compile(
    r"(?i)(?:\d+[.)]?\s*)?(?:abstract|key (?:points?|ideas?|contributions?|insights?|findings?)|"
    r"contributions?|(?:the )?methods?|"
    r"methodology|experiments?|results?|related work|technical details|main (?:ideas?|contributions?)|"
    r"ablations?)\s*:?"
)


def _skeleton(first: Block, heads: list[Block], rows: list[str]) -> bool:
    """Whether a file has the build of notes on one paper: a title, and a "TL;DR" or the parts of a paper below it."""
    shown = inline(first.content)
    title = lines.parse(shown).title if shown.links else shown.text
    if not (lines.is_title(title) or shown.links) or _GENERIC.fullmatch(title.strip()):
        return False
    below = [h for h in heads if h is not first]
    if any(h.level <= first.level and not SECTIONS.fullmatch(inline(h.content).text.strip()) for h in below):
        return False
    tldr = any(re.match(r"(?i)[\s>*_-]*tl;?dr\b", row) for row in rows[first.end : first.end + 10])
    return tldr or sum(bool(_PARTS.fullmatch(inline(h.content).text.strip())) for h in below) > 1


def _people_line(content: str) -> str:
    text = inline(content.split("\n")[0]).text
    return re.sub(r"[,(]?\s*(?:19|20)\d{2}\)?|^\s*(?:by|authors?:)\s+", "", text, flags=re.I).strip(" -–,.")


def _opening(top: Block) -> lines.Head | None:
    """The line that opens a file without a heading, where it is the link of a paper."""
    if top.kind != "paragraph" or "://" not in top.content:
        return None
    shown = inline(top.content.split("\n")[0].rstrip("\\").rstrip())
    return lines.parse(shown) if shown.lead and not shown.after.strip(" .") else None


def _labelled(rows: list[str]) -> list[Link]:
    """Links of lines that hold labelled links only, where one leads to a paper."""
    found = [link for row in rows if "](" in row and len(row) < 2000 for link in label_links(row)]
    return found if any(lines.leads_to_paper(link.url, link.label) for link in found) else []


_LABELLED = re.compile(r"^\s*(?:>\s*)*(?:[-*+]\s+|\d+[.)]\s+)?")


def label_links(row: str) -> list[Link]:
    """The links of a line that holds nothing but labels and their links: `Paper: <url> | [code](url)`; else none."""
    if "://" not in row and "](" not in row:
        return []
    shown = inline(row[_LABELLED.match(row).end() :].strip().rstrip("\\").rstrip())
    words = " ".join(part.text for part in shown.parts if part.kind in ("text", "code"))
    links = [part for part in shown.parts if part.kind == "link"]
    if not links or not all(part.text == part.url or lines.is_label(part.text) for part in links):
        return []
    bare = re.sub(r"[\W_]+", " ", words).strip()
    if bare and not lines.is_label(bare) and not lines._badge(words.strip(" []()|,;."), lines.Head()):
        return []
    before = ""
    found = []
    for part in shown.parts:
        if part.kind == "link":
            label = "" if part.text == part.url else part.text.strip().strip("[]")
            found.append(Link(part.url, label or before.strip(" :-–|,;*_[]()")))
            before = ""
        else:
            before += part.text
    return [link for link in found if link.url]


def entry(path: str, rows: list[str], front: FrontMatter, tree: tuple[Block, ...], found: Facts) -> Entry:
    """A file as the entry of its paper."""
    top = next((block for block in tree if block.kind != "hr"), None)
    heading = top if top is not None and top.kind == "heading" and top.level < 7 else None
    head = lines.parse(inline(heading.content)) if heading else (_opening(top) if top else None)
    shown = inline(heading.content) if heading else None
    title, name = _page_title(path, found, head, shown, rows[front.lines :], tree)
    linked = head is not None and bool(head.links)
    own_title = heading is not None and (linked or not found.first("title") or _alike(shown.text, found.first("title")))
    titled = heading is not None and (own_title or not _GENERIC.fullmatch(shown.text))
    body = heading.end if titled else front.lines
    start = heading.start if titled else min(front.lines, len(rows) - 1)
    links = [Link(url) for url in found.values.get("link", ()) if url.startswith("http")]
    links += [link for link in (head.links if head and linked else ()) if link.url]
    links += [link for link in _labelled(rows[body:]) if from_url(link.url) or not links]
    links = list({link.url: link for link in links}.values())
    ids = _ids(found) or unique(from_url(link.url) for link in links) or from_text(head.title if head else "")
    if not ids:
        several = unique(from_url(link.url) for link in mentions(rows[body:]))
        ids = several if len(several) == 1 else ()
    if not ids:
        ids = from_text(" ".join(row for row in rows[body : body + 12] if len(row) < 2000))[:1]
    known = {link.url for link in links}
    links += [link for link in mentions(rows[body:]) if link.url not in known]
    authors = _people(found) or (head.authors if head else ()) or _people_below(tree, heading or top)
    year = lines._any_year(found.first("year")) or lines._any_year(found.first("date")) or (head.year if head else None)
    year = year or lines._any_year(title[-7:]) or _year_below(tree, heading or top) or year_of(ids)
    extra = tuple(
        (str(key).lower(), str(value))
        for key, value in front.values.items()
        if _KEYS.get(str(key).casefold()) in (None, "citekey", "kind", "read on", "aside")
        and not str(key).startswith("dg-")
        and isinstance(value, str | int | float)
        and str(value)
    )
    reference = Reference(
        title, name, authors, year, found.first("venue") or (head.venue if head else ""), ids, tuple(links), extra
    )
    written = tuple(dict.fromkeys([*frontmatter.tags(front.values), *found.values.get("tags", ())]))
    hashed = _hashes(rows[front.lines : front.lines + 8])
    state = tables.STATES.get(found.first("status").casefold().strip().strip("#"), "")
    state = state or next(
        (_READ_TAGS[tag.casefold()] for tag in (*written, *hashed) if tag.casefold() in _READ_TAGS), ""
    )
    done = days.written(found.first("read on"))
    task = Task(
        state,
        tasks.symbol_of(state) if state else "",
        dates=Dates(done=done if state == "done" and len(done) == 10 else ""),
    )
    origin = Origin(path, start + 1, len(rows), body + 1, (), "page", 0, rows[start])
    return Entry(reference, task, written, dedent([row for row in rows[body:] if len(row) <= LONG]), origin)


def _page_title(path, found, head, shown, rows: list[str], tree: tuple[Block, ...]) -> tuple[str, str]:
    """(title, short name) of a page."""
    given = found.first("title").strip().lstrip("@").strip()
    if given.startswith(("http://", "https://")):
        given = ""
    first = _first_bullet(tree)
    if given and len(given.split()) < 3 < len(first.split()):
        return first, given  # Logseq: the first bullet is the title, the properties' title a short name
    if given:
        return inline(given).text or given, ""
    if head is not None and head.title and not _GENERIC.fullmatch(head.title) and not lines.is_label(head.title):
        plain = shown is not None and not head.links
        return (_plain_heading(shown.text) if plain else head.title), head.name
    alias = next((a for a in found.values.get("aliases", ()) if lines.is_title(a)), "")
    return alias or PurePath(path).stem, ""


def _plain_heading(text: str) -> str:
    match = re.match(r"(?i)(?:paper(?: notes?| summary| review)?|notes? on|summary|review)\s*[:–-]\s+(?=\S)", text)
    return text[match.end() :] if match else text.strip()


def _first_bullet(tree: tuple[Block, ...]) -> str:
    """The words of a file's first bullet, where what hangs below it are the paper's own metadata."""
    top = next((block for block in tree if block.kind != "hr"), None)
    if top is None or top.kind != "list" or not top.children or not top.children[0].children:
        return ""
    item = top.children[0]
    below = [child for child in item.children if child.kind == "list"]
    content = item.children[0].content if item.children[0].kind == "paragraph" else ""
    if not below or not content or "::" in content:
        return ""
    return re.sub(r"\s+#\S+", "", inline(content.split("\n")[0]).text).strip()


def _alike(one: str, other: str) -> bool:
    a, b = ("".join(c for c in text.casefold() if c.isalnum()) for text in (one, other))
    return a.startswith(b[:20]) or b.startswith(a[:20])


def _people(found: Facts) -> tuple[names.Name, ...]:
    out: list[names.Name] = []
    for text in found.values.get("authors", ()):
        inverted = re.fullmatch(r"[^,;]+,\s*[^,;]+", text) and len(text.split(",")[0].split()) < 3
        alone = inverted and len(text.split(",")[0].split()) == 1
        out += [names.inverted(text)] if alone else names.people(text)
    return tuple(dict.fromkeys(out))


def _people_below(tree: tuple[Block, ...], top: Block | None) -> tuple[names.Name, ...]:
    """Authors that a line below the title names."""
    for content in _lines_below(tree, top):
        text = _people_line(content)
        if lines.are_people(text):
            return names.people(text)
    return ()


def _year_below(tree: tuple[Block, ...], top: Block | None) -> int | None:
    for content in _lines_below(tree, top):
        if len(content) < 200 and lines.are_people(_people_line(content)):
            return lines._any_year(content)
    return None


def _lines_below(tree: tuple[Block, ...], top: Block | None) -> list[str]:
    if top is None:
        return []
    after = tree[tree.index(top) + 1 : tree.index(top) + 2]
    own = top.content.split("\n")[1:3] if top.kind == "paragraph" else []
    return own + [row for block in after if block.kind == "paragraph" for row in block.content.split("\n")[:2]]


def _hashes(rows: list[str]) -> list[str]:
    return [tag for row in rows if "#" in row for tag in re.findall(r"(?<!\S)#([\w/-]+)", row)]


def _ids(found: Facts):
    fields = [(key, value) for key in ("arxiv", "doi", "link", "venue") for value in found.values.get(key, ())]
    renamed = {"link": "url", "venue": "journal"}
    return from_fields((renamed.get(key, key), inline(value).text if key != "link" else value) for key, value in fields)
