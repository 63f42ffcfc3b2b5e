"""Markdown files -> entries, whatever shape the notes have.

One walk over the blocks of a file knows these shapes: a table with a title column; a heading that links to its paper;
a list of tasks, of bold titles, or of links, with nested notes; a dated heading over linked papers; a file a paper,
described by its front matter or holding one paper's link. What fits none is kept verbatim in a remark.
"""

import re
from dataclasses import replace

from deltax.library import carrier, days, frontmatter, pages, tables, tasks
from deltax.library.identifiers import from_text, from_url, unique
from deltax.library.markdown import LONG, Block, Inline, blocks, dedent, inline, mentions
from deltax.library.model import Dates, Entry, Link, Origin, Reading, Reference, Remark, Task, flat, unflat
from deltax.library.tags import slug

_BOLD = re.compile(r"(?:\*\*|__)(?:(?P<year>(?:19|20)\d{2})[ :,.-]+)?(?P<title>.+?)(?:\*\*|__)(?P<after>.*)", re.S)
_ASIDES = re.compile(
    r"(source )?code|github|repo(sitory)?|blog( ?post)?|web(site| ?page)|project( page)?|video|slides|tweet|thread|"
    r"demo|pdf|link",
    re.I,
)
_CELL_END = re.compile(r"(?<!\\)\|")
_LIST_MARK = re.compile(r"\s*([-*+]|\d+[.)])\s")
KEPT = "text in no entry: kept as the page's"
_SEPARATOR = re.compile(r"^(?:[-–—:|]+\s+|[–—:]\s*)")


def read(path: str, lines: list[str]) -> Reading:
    """Entries of one Markdown file given as its lines. Raises nothing on malformed input: it becomes remarks."""
    front = frontmatter.read(lines)
    page = _Page(path, lines, front)
    if front.problem:
        line, reason = front.problem
        page.remark(line - 1, max(front.lines, line), reason)
    for number, text in enumerate(lines):
        if len(text) > LONG:
            page.remark(number, number + 1, f"a line of {len(text)} characters: kept, not parsed")
    tree = blocks([""] * front.lines + lines[front.lines :])
    described = pages.described(path, lines, front, tree)
    if described is None:
        page.walk(tree)
        if not page.entries:
            described = pages.single_paper(path, lines, front, tree)
    entries, remarks = page.entries, page.remarks
    if described is not None:
        page.carried = {}
        described = replace(described, task=replace(described.task, dates=Dates(noted=page.day or "")))
        page.entries = entries = [described]
        page.nested(tree, described, False)
        remarks = [r for r in page.remarks if r.reason != KEPT]
    entries = page.whole(entries)
    return Reading(
        path,
        tuple(sorted(entries, key=lambda e: e.origin.line)),
        tuple(sorted(remarks, key=lambda r: (r.line, r.end))),
        front.values,
    )


class _Page:
    def __init__(self, path: str, lines: list[str], front: frontmatter.FrontMatter):
        self.path, self.lines, self.front = path, lines, front
        self.tags = frontmatter.tags(front.values)
        self.entries: list[Entry] = []
        self.remarks: list[Remark] = []
        self.carried: dict[int, str] = {}
        self.sections: list[tuple[int, str]] = []
        self.day: str | None = days.file_day(path) or None

    # What the file holds: sections, tables, lists, paragraphs.

    def walk(self, tree: tuple[Block, ...]) -> None:
        tops = [block for block in tree if block.kind == "heading" and block.level == 1]
        first = next((block for block in tree if block.kind == "heading"), None)
        at = 0
        while at < len(tree):
            block = tree[at]
            if block.kind == "heading":
                if len(tops) == 1 and block is first is tops[0] and not self._is_entry_heading(tree, at):
                    day = days.heading_day(inline(block.content).text)
                    self.day = day if day is not None else self.day
                    at += 1
                else:
                    at = self.heading(tree, at)
            elif block.kind == "table":
                self.table(block)
                at += 1
            elif block.kind == "paragraph":
                at = self.paragraph(tree, at)
            else:
                self.container(block, self.section)
                at += 1

    def container(self, block: Block, section: tuple[str, ...]) -> None:
        if block.kind == "list":
            self.items(block, section)
        elif block.kind == "blockquote" and any(child.kind == "list" for child in block.children):
            for child in block.children:
                self.container(child, section)
        elif block.kind != "hr":
            self.remark(block.start, block.end, KEPT)

    @property
    def section(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.sections)

    def heading(self, tree: tuple[Block, ...], at: int) -> int:
        block = tree[at]
        shown = inline(block.content)
        day = days.heading_day(shown.text)
        if not self._is_entry_heading(tree, at):
            self.sections = [(level, text) for level, text in self.sections if level < block.level]
            if day is None:
                self.sections.append((block.level, shown.text.rstrip(":")))
            else:
                self.day = day
                if day == "":
                    self.remark(block.start, block.end, f"{shown.text} can be two dates: write it as YYYY-MM-DD")
            return at + 1
        stop = at + 1
        while stop < len(tree) and not self._ends_heading(tree, stop, block.level):
            stop += 1
        self.sections = [(level, text) for level, text in self.sections if level < block.level]
        end = tree[stop].start if stop < len(tree) else len(self.lines)
        line = tasks.peel(shown.text)
        entry = self.make(shown, line, (block.start, end, block.end), "heading")
        self.nested(tree[at + 1 : stop], entry)
        return stop

    def _is_entry_heading(self, tree: tuple[Block, ...], at: int) -> bool:
        shown = inline(tree[at].content)
        if any(from_url(link.url) for link in shown.links):
            return True
        if shown.lead and not _ASIDES.fullmatch(shown.lead) and _external(shown.links):
            return True
        following = tree[at + 1] if at + 1 < len(tree) else None
        if following is None or following.kind != "paragraph" or days.heading_day(shown.text) is not None:
            return False
        first = inline(following.content.split("\n", 1)[0])
        return _bare(first) and bool(from_url(first.links[0].url))

    def _ends_heading(self, tree: tuple[Block, ...], at: int, level: int) -> bool:
        block = tree[at]
        if block.kind != "heading":
            return False
        shown = inline(block.content)
        if block.level <= level or days.heading_day(shown.text) is not None:
            return True
        return any(from_url(link.url) for link in shown.links)

    def paragraph(self, tree: tuple[Block, ...], at: int) -> int:
        """A line that is only a link heads an entry: any link under a date, a paper's link elsewhere."""
        block = tree[at]
        starts = self._leads(block)
        if not starts:
            self.remark(block.start, block.end, KEPT)
            return at + 1
        if starts[0] > block.start:
            self.remark(block.start, starts[0], KEPT)
        stop = at + 1
        while (
            stop < len(tree)
            and tree[stop].kind != "heading"
            and not (tree[stop].kind == "paragraph" and self._leads(tree[stop]))
        ):
            stop += 1
        end = tree[stop].start if stop < len(tree) else len(self.lines)
        for start, following in zip(starts, [*starts[1:], end], strict=True):
            shown = inline(self.lines[start].strip().rstrip("\\"))
            shape = "diary" if self.day is not None else "link"
            entry = self.make(shown, tasks.peel(shown.text), (start, following, start + 1), shape)
            if following == end:
                self.nested(tree[at + 1 : stop], entry)
        return stop

    def _leads(self, block: Block) -> list[int]:
        found = []
        for number in range(block.start, block.end):
            if "://" not in self.lines[number]:
                continue
            shown = inline(self.lines[number].strip().rstrip("\\"))
            if not _bare(shown):
                continue
            dated = self.day is not None and number == block.start and not _ASIDES.fullmatch(shown.lead)
            if from_url(shown.links[0].url) or (dated and _external(shown.links)):
                found.append(number)
        return found

    def table(self, block: Block) -> None:
        rows = [row for row in block.children if row.kind == "row"]
        columns = tables.columns([cell.content for cell in rows[0].children]) if rows else None
        if columns is None:
            self.remark(block.start, block.end, "a table without a title column: kept")
            return
        for row in rows[1:]:
            cells = [cell.content for cell in row.children]
            if len(_CELL_END.findall(self.lines[row.start].strip().strip("|"))) >= len(cells):
                self.remark(row.start, row.end, "a row with more cells than the head: escape a | in a cell as \\|")
            last, rode = carrier.take(cells[-1])
            if rode is not None:
                self.carried[row.start + 1] = rode
            made = tables.entry(columns, [*cells[:-1], last])
            if made is None:
                self.remark(row.start, row.end, "a row without a title: kept")
                continue
            entry, problems = made
            origin = Origin(self.path, row.start + 1, row.end, 0, self.section, "table", 0, self.lines[row.start])
            dates = replace(entry.task.dates, noted=entry.task.dates.noted or self.day or "")
            task = replace(entry.task, dates=dates)
            self.entries.append(Entry(entry.reference, task, self._all_tags(entry.tags), entry.text, origin))
            for problem in problems:
                self.remark(row.start, row.end, problem)

    def items(self, block: Block, section: tuple[str, ...]) -> None:
        boxes = any(tasks.checkbox(_content(item)) for item in block.children)
        for item in block.children:
            boxes = boxes or self._marked(item)
            if not self.item(item, section, boxes):
                self.plain_item(item, section)

    def plain_item(self, item: Block, section: tuple[str, ...]) -> None:
        """An item that is no entry may be the label of a list that holds some."""
        lists = [child for child in item.children if child.kind == "list"]
        count, kept = len(self.entries), len(self.remarks)
        label = inline(_content(item).split("\n")[0]).text.rstrip(":")
        for child in lists:
            self.items(child, (*section, label) if label else section)
        if len(self.entries) == count:
            del self.remarks[kept:]
            if "".join(self.lines[item.start : item.end]).strip(" \t-*+>"):
                self.remark(item.start, item.end, KEPT)

    def item(self, item: Block, section: tuple[str, ...], boxes: bool, within: Entry | None = None) -> Entry | None:
        """The entry that a list item is, with those nested in it; None when it is none."""
        content = _content(item)
        first = content.split("\n")[0].rstrip("\\").rstrip(" \t")
        box = tasks.checkbox(first)
        place = (item.start, item.end, item.start + 1)
        if box:
            line = tasks.peel(box[1], box[0])
            if not line.text.strip():
                return None
            entry = self.make(inline(line.text), line, place, "task", section, within)
        elif within is None and boxes and first:
            line = tasks.peel(first)
            entry = self.make(inline(line.text), line, place, "task", section)
        elif first.startswith(("**", "__")) and (within is None or within.origin.shape == "bold"):
            entry = self.bold(item, content, section, within)
        else:
            entry = self.linked_item(item, first, section, within)
        if entry is not None:
            self.nested(item.children, entry)
        return entry

    def bold(self, item: Block, content: str, section: tuple[str, ...], within: Entry | None) -> Entry | None:
        first = content.split("\n")[0].rstrip("\\").rstrip()
        match = _BOLD.match(first)
        if match is None:
            return None
        after = match["after"].strip().strip("\\*").strip()
        shown = inline(match["title"])
        direct = next((child.start for child in item.children if child.kind == "list"), item.end)
        if not (match["year"] or shown.links or self._own(item.start + 1, direct) or from_text(after)):
            return None
        shown = replace(shown, text=shown.text.strip("\\*").strip())
        text = (after,) if after else ()
        line = tasks.Line(shown.text, Task())
        year = int(match["year"]) if match["year"] else None
        entry = self.make(shown, line, (item.start, item.end, item.start + 1), "bold", section, within, text)
        entry = replace(entry, reference=replace(entry.reference, year=year))
        self.entries[-1] = entry
        return entry

    def linked_item(self, item: Block, first: str, section: tuple[str, ...], within: Entry | None) -> Entry | None:
        if "://" not in first:
            return None
        shown = inline(tasks.peel(first).text)
        paper = any(from_url(link.url) for link in shown.links)
        if within is None:
            if not paper and not (shown.lead and _external(shown.links)):
                return None
        elif not (_bare(shown) and paper and (item.end - item.start > 1 or not _has_own(within))):
            return None
        place = (item.start, item.end, item.start + 1)
        return self.make(shown, tasks.peel(first), place, "list", section, within)

    def nested(self, children: tuple[Block, ...], parent: Entry, direct: bool = True) -> None:
        """Entries inside an entry's text: tasks, papers with notes of their own, and the papers of a group."""
        for child in children:
            if child.kind == "item":
                holder = parent if direct else replace(parent, reference=replace(parent.reference, links=(Link("-"),)))
                if self.item(child, parent.origin.section, False, holder) is None:
                    self.nested(child.children, parent, False)
            elif child.kind in ("list", "blockquote"):
                self.nested(child.children, parent, direct)

    # One entry.

    def make(
        self, shown: Inline, line: tasks.Line, place: tuple[int, int, int], shape: str,
        section: tuple[str, ...] | None = None, within: Entry | None = None, text: tuple[str, ...] = (),
    ) -> Entry:  # fmt: skip
        start, end, body = place
        while end > start + 1 and (len(self.lines[end - 1]) > LONG or not self.lines[end - 1].strip()):
            end -= 1
        title, rest = line.text if shown.text == line.text else shown.text, [*text]
        if shown.lead and shape != "heading" and (match := _SEPARATOR.match(shown.after)):
            title, rest = shown.lead, [*rest, shown.after[match.end() :]]
        nested = [line for line in self.lines[body:end] if len(line) <= LONG]
        rode = carrier.take(nested[-1])[1] if nested else None
        if rode is not None and within is None:
            self.carried[start + 1] = rode
            nested = nested[:-1]
        links = tuple(link for link in shown.links if link.url)
        if not any(link.role == "own" for link in links):
            first_item = next((n for n in range(body, end) if _LIST_MARK.match(self.lines[n])), end)
            links += self._own(body, first_item)
        title = title or next((link.url for link in links), "")
        ids = unique([*(from_url(link.url) for link in links if link.role == "own"), *from_text(line.text)])
        known = {link.url for link in links}
        links += tuple(link for link in mentions([*rest, *nested]) if link.url not in known)
        origin = Origin(
            self.path, start + 1, end, body + 1 if body < end else 0, self.section if section is None else section,
            shape, within.origin.line if within else 0, self.lines[start],
        )  # fmt: skip
        task = replace(line.task, dates=replace(line.task.dates, noted=self.day or ""))
        reference = Reference(title, ids=ids, links=links)
        entry = Entry(reference, task, self._all_tags(line.tags, origin.section), _join(rest, dedent(nested)), origin)
        for problem in line.problems:
            self.remark(start, start + 1, problem)
        self.entries.append(entry)
        return entry

    def _marked(self, item: Block) -> bool:
        return any(carrier.MARK in line for line in self.lines[item.start : item.end])

    def whole(self, entries: list[Entry]) -> list[Entry]:
        """Entries of an exported file with what rode along; their text is theirs alone, and holds no entries."""
        if not self.carried:
            return entries
        entries = [e for e in entries if e.origin.within not in self.carried]
        return [
            unflat(carrier.unpack(packed, flat(e)), e.origin) if (packed := self.carried.get(e.origin.line)) else e
            for e in entries
        ]

    def _own(self, start: int, end: int) -> tuple[Link, ...]:
        """Links that stand alone on their lines, below a title that has none."""
        found = []
        for text in self.lines[start:end]:
            if len(text) <= LONG and "://" in text:
                shown = inline(text.strip().rstrip("\\").strip())
                found += [shown.links[0]] if _bare(shown) else []
        return tuple(found)

    def _all_tags(self, own: tuple[str, ...], section: tuple[str, ...] | None = None) -> tuple[str, ...]:
        section = self.section if section is None else section
        return tuple(dict.fromkeys([*own, *self.tags, *filter(None, map(slug, section))]))

    def remark(self, start: int, end: int, reason: str) -> None:
        while end > start + 1 and not self.lines[end - 1].strip():
            end -= 1
        self.remarks.append(Remark(self.path, start + 1, end, reason, "\n".join(self.lines[start:end])))


def _content(item: Block) -> str:
    return item.children[0].content if item.children and item.children[0].kind in ("paragraph", "heading") else ""


def _bare(shown: Inline) -> bool:
    """Nothing but one link."""
    return bool(shown.lead) and not shown.after.strip(" .\\") and shown.links[0].role == "own"


def _has_own(entry: Entry) -> bool:
    return any(link.role == "own" for link in entry.reference.links)


def _external(links: tuple[Link, ...]) -> bool:
    return any(link.role == "own" and link.url.lower().startswith(("http://", "https://")) for link in links)


def _join(first: list[str], rest: str) -> str:
    return "\n".join([*filter(None, first), *([rest] if rest else [])])
