"""Markdown files -> entries, whatever shape the notes have.

First it is decided what a file is. A page about one paper (pages.py) is one entry, and everything in it is its text.
Else the file is read as a list, by its own rhythm: what most of its items, rows and headings look like tells what an
entry of this file is, also where one has no link that is known. A line is taken apart by lines.py. What fits nothing,
or is doubtful, is kept word for word in a remark.
"""

import re
from dataclasses import dataclass, replace

from deltax.library import carrier, days, frontmatter, pages, tables, tasks
from deltax.library import lines as lines_
from deltax.library.identifiers import from_text, from_url, unique, year_of
from deltax.library.markdown import LONG, Block, Inline, blocks, dedent, html_lists, inline, mentions
from deltax.library.model import Entry, Link, Origin, Reading, Reference, Remark, Task, flat, unflat
from deltax.library.tags import slug

_BOLD = re.compile(r"(?:\*\*|__)(?:(?P<year>(?:19|20)\d{2})[ :,.-]+)?(?P<title>.+?)(?:\*\*|__)(?P<after>.*)", re.S)
_CELL_END = re.compile(r"(?<!\\)\|")
_LIST_MARK = re.compile(r"\s*([-*+]|\d+[.)])\s")
KEPT = "text in no entry: kept as the page's"
NOT_A_PAPER = "a box that names no paper: kept as the page's"
LINK_ONLY = "a link among no papers: kept as the page's"
NO_TABLE = "a table whose rows are no papers: kept"
_READING = re.compile(
    r"(?i)\b(?:papers?|reading|to[- ]?read|literature|bibliograph\w*|publications?|arxiv|articles?|"
    r"preprints?|references|"
    r"awesome|surveys?|journal club|books?)\b|论文|文献"
)
_CHORE = re.compile(
    r"(?i)(?:ask|scrape|fix|e?mail|call|buy|write|add|update|clean|check|finish|implement|refactor|test|try|run|set|setup|"
    r"install|submit|send|schedule|book|pay|make|create|delete|remove|prepare|plan|talk|meet|follow|contact|reply|discuss|"
    r"reproduce|compare|investigate|look|find|figure|move|merge|deploy|debug|document|organi[sz]e|order|pick|get|do|"
    r"start|draft|collect|download|upload|rename|rewrite|register|apply|renew|wash|cook|water|return|print|scan|sign|file|"
    r"back|sync|upgrade|migrate|configure|build|evaluate|plot|visuali[sz]e|remind|bring|post|publish|improve|change|"
    r"replace|use|let|need|should|think|decide|ping|complete|revise|proofread|polish|measure|tune|log|record)\s+\w"
)
_CHORES = re.compile(
    r"(?i)(?:to-?dos?|tasks?|next steps?|action items?|chores?|shopping|errands|backlog|roadmap|milestones?|plan)"
)
_STATE_HEADINGS = (
    ("todo", r"(?:my )?(?:papers? |articles? )?(?:to[- ]?(?:be )?read|unread|want to read|not (?:yet )?read|"
             r"to[- ]?read list|"
             r"reading queue|queue|backlog|up next|read(?:ing)? later|tbr)(?: papers?| list| next)?"),
    ("done", r"(?:already |have |papers? )?(?:read|done|finished|completed)(?: papers?| already| list)?"),
    ("doing", r"(?:currently |now |papers? )?(?:reading|in progress)(?: now| papers?| currently)?"),
    ("hold", r"(?:on hold|paused)"),
    ("cancelled", r"(?:abandoned|dropped|cancell?ed)"),
)  # fmt: skip
_LOGSEQ = {"TODO": "todo", "LATER": "todo", "NOW": "doing", "DOING": "doing", "IN-PROGRESS": "doing", "WAITING": "hold"}
_LOGSEQ |= {"WAIT": "hold", "DONE": "done", "CANCELED": "cancelled", "CANCELLED": "cancelled"}
_MARKER = re.compile(
    r"(TODO|LATER|NOW|DOING|IN-PROGRESS|WAITING|WAIT|DONE|CANCELL?ED)[ \t]+(?:\[#[A-C]\][ \t]+)?(?=\S)"
)


def read(path: str, lines: list[str]) -> Reading:
    """Entries of one Markdown file given as its lines. Raises nothing on malformed input: it becomes remarks."""
    front = frontmatter.read(lines)
    rows = html_lists(lines)
    page = _Page(path, lines, rows, front)
    if front.problem:
        line, reason = front.problem
        page.remark(line - 1, max(front.lines, line), reason)
    for number, text in enumerate(lines):
        if len(text) > LONG:
            page.remark(number, number + 1, f"a line of {len(text)} characters: kept, not parsed")
    tree = blocks([""] * front.lines + rows[front.lines :])
    described = pages.decided(path, rows, front, tree)
    if described is None:
        page.survey(tree)
        page.walk(tree)
        described = pages.weighed(path, rows, front, tree, page.entries, _READING)
    entries, remarks = page.entries, page.remarks
    if described is not None:
        page.carried = {}
        day = page.day or days.file_day(path)
        described = replace(described, task=replace(described.task, dates=replace(described.task.dates, noted=day)))
        entries = [described]
        remarks = [r for r in page.remarks if r.reason not in (KEPT, NOT_A_PAPER, LINK_ONLY, NO_TABLE)]
    entries = page.whole(entries)
    return Reading(
        path,
        tuple(sorted(entries, key=lambda e: e.origin.line)),
        tuple(sorted(remarks, key=lambda r: (r.line, r.end))),
        front.values,
    )


@dataclass
class _Rhythm:
    """What the lines of a list, or of a file, look like. `items`: how many; `papers`: those that link to a paper or
    name one behind a title; `links`: those that open with another link, `local` those that open
    with a title linked to a file beside them; `bold`: those that open with bold words; `boxes`."""

    items: int = 0
    papers: int = 0
    links: int = 0
    local: int = 0
    bold: int = 0
    boxes: int = 0

    def __iadd__(self, other: "_Rhythm") -> "_Rhythm":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class _Page:
    def __init__(self, path: str, lines: list[str], rows: list[str], front: frontmatter.FrontMatter):
        self.path, self.written, self.lines, self.front = path, lines, rows, front
        self.tags = frontmatter.tags(front.values)
        self.entries: list[Entry] = []
        self.remarks: list[Remark] = []
        self.carried: dict[int, str] = {}
        self.sections: list[tuple[int, str]] = []
        self.day: str | None = days.file_day(path) or None
        self.year: int | None = None
        self.heads: dict[tuple[int, str], lines_.Head] = {}
        self.all = _Rhythm()
        self.levels: dict[int, list[bool]] = {}
        self.reading = self.titled = False
        self.titled_paragraphs = 0

    # The rhythm of the file.

    def survey(self, tree: tuple[Block, ...]) -> None:
        """Count what the file's lists and headings hold, before any of it is read."""
        tops = [block for block in tree if block.kind == "heading" and block.level < 7]
        words = [str(self.front.values.get("title", "")), *(inline(block.content).text for block in tops)]
        name = re.split(r"[/\\]", self.path)[-1]
        self.reading = any(_READING.search(text) for text in (*words, name.replace("-", " ").replace("_", " ")))
        intro = " ".join(row for row in self.lines[self.front.lines : self.front.lines + 20] if len(row) < 2000)
        self.reading = self.reading or bool(re.search(r"(?i)\bpapers\b|reading list", intro))
        self.titled = any(block.level == 1 for block in tops)
        for block in tree:
            if block.kind == "list":
                self.all += self.rhythm(block, deep=True)
            elif block.kind == "table":
                rows = [[cell.content for cell in row.children] for row in block.children if row.kind == "row"][1:]
                self.all.papers += sum("://" in " ".join(row) and tables.papers([row], 0) for row in rows[:50])
            elif block.kind == "paragraph" and ("://" in block.content or "](" in block.content):
                head = self.head(block.content.split("\n")[0].rstrip("\\").rstrip(), block.start)
                self.all.papers += head.papers and head.style == "link"
                found = self.titled_paragraph(block)
                self.titled_paragraphs += found
                self.all.papers += found
        for at, block in enumerate(tree):
            if block.kind == "heading":
                entry = self._is_entry_heading(tree, at)
                self.levels.setdefault(block.level, []).append(entry)
                self.all.papers += entry

    def titled_paragraph(self, block: Block) -> bool:
        """Whether a paragraph opens with the title of a paper and holds labelled links to it."""
        rows = block.content.split("\n")
        if not _opens(rows[0]) or len(block.content) > 4000:
            return False
        head = self.head(tasks.peel(rows[0].rstrip("\\").rstrip()).text, block.start)
        if not head.title or lines_.is_label(head.title) or head.title.rstrip().endswith(":"):
            return False
        titled = lines_.is_title(head.title) or head.style in ("quote", "bold") or bool(head.authors)
        if not titled or head.style == "link":
            return False
        if head.links:
            return head.papers and (len(head.summary) < 120 or bool(head.authors))
        told = [link for row in rows[1:6] for link in pages.label_links(row)]
        paper = any(lines_.leads_to_paper(link.url, link.label) for link in told)
        return paper or bool(told and self.titled_paragraphs >= 3)

    def rhythm(self, block: Block, deep: bool = False) -> _Rhythm:
        found = _Rhythm()
        for item in block.children:
            content, _ = self.opening(item)
            if not content:
                continue
            found.items += 1
            box = tasks.checkbox(content)
            found.boxes += box is not None
            text = box[1] if box else content
            found.bold += text.startswith(("**", "__"))
            if "](" in text or "://" in text or "<a " in text or "doi" in text or "arXiv" in text:
                head = self.head(tasks.peel(text).text, item.start)
                if _is_paper(head):
                    found.papers += 1
                elif head.style == "link" and _external(tuple(head.links)) and not lines_.is_label(head.title):
                    found.links += 1
                elif head.style == "link" and lines_.is_title(head.title):
                    found.local += 1
            elif len(item.children) > 1 or "\n" in _content(item):
                found.papers += any(lines_.leads_to_paper(k.url, k.label) for k in self._labels_below(item))
            if deep:
                for child in item.children:
                    if child.kind == "list":
                        found += self.rhythm(child, deep)
        return found

    def head(self, text: str, start: int) -> lines_.Head:
        """A line taken apart, once."""
        known = self.heads.get((start, text))
        if known is None:
            known = self.heads[start, text] = lines_.parse(inline(text))
        return known

    def opening(self, item: Block) -> tuple[str, int]:
        """The words that open an item, hard-wrapped lines joined, and how many lines they take."""
        rows = _content(item).split("\n")
        first = rows[0].rstrip(" \t")
        if first.endswith("\\") and not first.endswith("\\\\"):
            return first.rstrip("\\").rstrip(" \t"), 1
        count = 1
        while count < min(len(rows), 6) and _goes_on(first, rows[count], rows[count:]):
            first = f"{first} {rows[count].strip()}"
            count += 1
        return first.rstrip("\\").rstrip(" \t"), count

    def _labels_below(self, item: Block) -> list[Link]:
        """Links of the lines below an item's first that hold labels and links only."""
        found: list[Link] = []
        for number in range(item.start + 1, min(item.end, item.start + 12)):
            row = self.lines[number]
            if len(row) <= LONG and ("://" in row or "](" in row):
                found += pages.label_links(row)
        return found

    def doubtful(self) -> bool:
        """Whether a line of this file that only links elsewhere is a paper no more likely than not."""
        return not (self.all.papers and self.all.papers * 3 >= self.all.links) and not (
            self.reading and not self.all.links
        )

    # What the file holds: sections, tables, lists, paragraphs.

    def walk(self, tree: tuple[Block, ...]) -> None:
        tops = [block for block in tree if block.kind == "heading" and block.level == 1]
        first = next((block for block in tree if block.kind == "heading"), None)
        at = 0
        while at < len(tree):
            block = tree[at]
            if block.kind == "heading":
                if len(tops) == 1 and block is first is tops[0] and not self._is_entry_heading(tree, at):
                    self.date(inline(block.content).text)
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

    def date(self, text: str) -> bool:
        """Take a heading that is only a day, a month or a year. Whether it is one."""
        day = days.heading_day(text)
        if day is not None:
            self.day = day
            return True
        when = days.written(text)
        month = days.month_name(text) if not when and self.year else None
        if len(when) == 4:
            self.year, self.day = int(when), None
        elif when or month:
            self.day = when or f"{self.year}-{month:02}"
        return bool(when or month)

    def heading(self, tree: tuple[Block, ...], at: int) -> int:
        block = tree[at]
        shown = inline(block.content)
        if not self._is_entry_heading(tree, at) and not self._in_rhythm(tree, at):
            self.sections = [(level, text) for level, text in self.sections if level < block.level]
            if not self.date(shown.text):
                words = lines_._SHORTCODE.sub("", shown.text).strip()
                self.sections.append((block.level, words.rstrip(":") or shown.text))
            elif self.day == "":
                self.remark(block.start, block.end, f"{shown.text} can be two dates: write it as YYYY-MM-DD")
            return at + 1
        stop = at + 1
        while stop < len(tree) and not self._ends_heading(tree, stop, block.level):
            stop += 1
        self.sections = [(level, text) for level, text in self.sections if level < block.level]
        end = tree[stop].start if stop < len(tree) else len(self.lines)
        line = tasks.peel(block.content)
        entry = self.make(self.head(line.text, block.start), line, (block.start, end, block.end), "heading")
        self.nested(tree[at + 1 : stop], entry)
        return stop

    def _is_entry_heading(self, tree: tuple[Block, ...], at: int) -> bool:
        """A heading that links to a paper, or stands above lines that only do that."""
        block = tree[at]
        if "](" in block.content or "://" in block.content or "<a " in block.content:
            head = self.head(tasks.peel(block.content).text, block.start)
            if head.papers and head.title and not lines_.is_label(head.title):
                return True
            if head.style == "link" and _external(tuple(head.links)) and not lines_.is_label(head.title):
                return (
                    self.all.papers > 0
                    or self.reading
                    or sum(b.kind == "heading" and "](" in b.content for b in tree) < 2
                )
        following = tree[at + 1] if at + 1 < len(tree) else None
        if following is None or following.kind not in ("paragraph", "list", "blockquote"):
            return False
        text = inline(block.content).text
        if (
            days.heading_day(text) is not None
            or days.written(text)
            or _state_of(text)
            or pages.SECTIONS.fullmatch(text)
        ):
            return False
        rows = self.lines[following.start : min(following.end, following.start + 6)]
        if following.kind == "paragraph" and "://" in rows[0]:
            first = inline(rows[0].strip().rstrip("\\").strip())
            if _bare(first) and first.links[0].label and not lines_.is_label(first.links[0].label):
                return False
        found: list[Link] = []
        for row in rows:
            if len(row) > LONG:
                break
            labelled = pages.label_links(row)
            found += labelled
            text = inline(row.strip(" \t>-*+")).text
            if not labelled and text and not pages.told(row) and not lines_.are_people(lines_._less_year(text)):
                break
        return any(lines_.leads_to_paper(link.url, link.label) for link in found)

    def _in_rhythm(self, tree: tuple[Block, ...], at: int) -> bool:
        """A heading without a link among headings of its level that are nearly all entries, with words below it."""
        known = self.levels.get(tree[at].level, [])
        if len(known) < 3 or sum(known) * 4 < len(known) * 3:
            return False
        text = inline(tree[at].content).text.strip()
        below = tree[at + 1] if at + 1 < len(tree) else None
        held = (
            below is not None
            and below.kind in ("paragraph", "list")
            and not (below.kind == "list" and self.rhythm(below).papers)
        )
        return held and not pages.SECTIONS.fullmatch(text) and not days.written(text) and not _state_of(text)

    def _ends_heading(self, tree: tuple[Block, ...], at: int, level: int) -> bool:
        block = tree[at]
        if block.kind != "heading":
            return False
        shown = inline(block.content)
        if days.heading_day(shown.text) is not None:
            return True
        if (
            block.level == level
            and pages.SECTIONS.fullmatch(shown.text.strip())
            and not self._is_entry_heading(tree, at)
        ):
            return any(b.kind == "list" and self.rhythm(b).papers > 1 for b in tree[at + 1 : at + 2])
        return block.level <= level or (self._is_entry_heading(tree, at) and any(from_url(k.url) for k in shown.links))

    def paragraph(self, tree: tuple[Block, ...], at: int) -> int:
        """A line that is only a link heads an entry: any link under a date, a paper's link elsewhere. So does a title
        with labelled links."""
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
            and (tree[stop].kind != "heading" or self._below(tree, stop))
            and not (tree[stop].kind == "paragraph" and self._leads(tree[stop]))
            and not (tree[stop].kind == "list" and self.all.papers > 2 and self.rhythm(tree[stop]).papers > 1)
        ):
            stop += 1
        end = tree[stop].start if stop < len(tree) else len(self.lines)
        for start, following in zip(starts, [*starts[1:], end], strict=True):
            line = tasks.peel(self.lines[start].strip().rstrip("\\"))
            shape = "diary" if self.day is not None else "link"
            entry = self.make(self.head(line.text, start), line, (start, following, start + 1), shape)
            if following == end:
                self.nested(tree[at + 1 : stop], entry)
        return stop

    def _below(self, tree: tuple[Block, ...], at: int) -> bool:
        """A bold line that heads a part of one paper's notes, not a part of the list."""
        block = tree[at]
        return block.level == 7 and bool(pages.SECTIONS.fullmatch(inline(block.content).text.strip()))

    def _leads(self, block: Block) -> list[int]:
        found = []
        if self.titled_paragraphs > 1 and self.titled_paragraph(block):
            return [block.start]
        for number in range(block.start, block.end):
            row = self.lines[number]
            if "://" not in row or len(row) > LONG:
                continue
            text = tasks.peel(row.strip().rstrip("\\")).text
            shown = inline(text)
            if not _bare(shown):
                continue
            label = shown.links[0].label
            dated = self.day is not None and number == block.start and not (label and lines_.is_label(label))
            paper = lines_.leads_to_paper(shown.links[0].url) and not (label and lines_.is_label(label))
            if paper or (dated and _external(shown.links)):
                found.append(number)
        return found

    def table(self, block: Block) -> None:
        rows = [row for row in block.children if row.kind == "row"]
        cells_of = [[cell.content for cell in row.children] for row in rows]
        columns = tables.columns(cells_of[0]) if rows else None
        if columns is None:
            columns = tables.guessed(cells_of[1:])
            if columns is None and rows and any(cells_of[0]) and tables.guessed(cells_of):
                columns, rows = tables.guessed(cells_of), [rows[0], *rows]  # no head: its first row is a paper
        elif not any(carrier.MARK in self.lines[row.start] for row in rows) and not tables.listed(
            columns, inline(cells_of[0][columns.index("title")]).text, cells_of[1:]
        ):
            columns = None
        if columns is None:
            self.remark(block.start, block.end, NO_TABLE)
            return
        for row in rows[1:]:
            cells = [cell.content for cell in row.children]
            if len(_CELL_END.findall(self.lines[row.start].strip().strip("|"))) >= len(cells):
                self.remark(row.start, row.end, "a row with more cells than the head: escape a | in a cell as \\|")
            last, rode = carrier.take(cells[-1])
            if rode is not None:
                self.carried[row.start + 1] = rode
            made = tables.entry(columns, [*cells[:-1], last], rode)
            if made is None:
                self.remark(row.start, row.end, "a row without a title: kept")
                continue
            entry, problems = made
            raw = self.written[row.start]
            origin = Origin(self.path, row.start + 1, row.end, 0, self.section, "table", 0, raw)
            dates = replace(entry.task.dates, noted=entry.task.dates.noted or self.day or "")
            task = self.stated(replace(entry.task, dates=dates), origin.section)
            reference = replace(entry.reference, year=entry.reference.year or self.year)
            self.entries.append(Entry(reference, task, self._all_tags(entry.tags), entry.text, origin))
            for problem in problems:
                self.remark(row.start, row.end, problem)

    def items(self, block: Block, section: tuple[str, ...]) -> None:
        rhythm = self.rhythm(block)
        boxes = any(tasks.checkbox(_content(item)) for item in block.children)
        boxes = boxes and self._boxes_are_papers(block, section)
        for item in block.children:
            boxed = boxes or self._marked(item)
            if not self.item(item, section, boxed, None, rhythm):
                self.plain_item(item, section, rhythm)

    def _boxes_are_papers(self, block: Block, section: tuple[str, ...]) -> bool:
        """Whether boxes without a link are things to read: not among chores, nor in a file about something else."""
        words = [tasks.checkbox(_content(item)) for item in block.children]
        plain = [box[1] for box in words if box and "](" not in box[1] and "://" not in box[1]]
        chores = sum(bool(_CHORE.match(text)) for text in plain)
        named = section[-1] if section else ""
        if self.all.papers:
            return chores * 2 < max(len(plain), 1) or not plain
        if _CHORES.fullmatch(named.strip()) and not self.reading:
            return False
        return (not self.titled or self.reading) and chores * 3 < max(len(plain), 1)

    def plain_item(self, item: Block, section: tuple[str, ...], rhythm: _Rhythm) -> None:
        """An item that is no entry may be the label of a list that holds some."""
        lists = [child for child in item.children if child.kind == "list"]
        count, kept = len(self.entries), len(self.remarks)
        label = lines_.parse(inline(_content(item).split("\n")[0])).title.rstrip(":") if lists else ""
        for child in lists:
            self.items(child, (*section, label) if label else section)
        if len(self.entries) == count:
            del self.remarks[kept:]
            if "".join(self.lines[item.start : item.end]).strip(" \t-*+>"):
                reason = NOT_A_PAPER if tasks.checkbox(_content(item)) else KEPT
                head = (
                    self.head(self.opening(item)[0], item.start) if reason is KEPT and "://" in _content(item) else None
                )
                if head is not None and head.style == "link" and _external(tuple(head.links)):
                    reason = LINK_ONLY
                self.remark(item.start, item.end, reason)

    def item(
        self, item: Block, section: tuple[str, ...], boxes: bool, within: Entry | None = None,
        rhythm: _Rhythm | None = None,
    ) -> Entry | None:  # fmt: skip
        """The entry that a list item is, with those nested in it; None when it is none."""
        first, count = self.opening(item)
        box = tasks.checkbox(first)
        place = (item.start, item.end, item.start + count)
        state = ""
        if not box and (marker := _MARKER.match(first)):
            state, first = _LOGSEQ[marker[1]], first[marker.end() :]
        entry = None
        if box:
            line = tasks.peel(box[1], box[0])
            if not line.text.strip() or not self._box_is_entry(line, item, boxes, within):
                return None
            entry = self.make(self.head(line.text, item.start), line, place, "task", section, within)
        elif within is None and boxes and first:
            line = tasks.peel(first)
            entry = self.make(self.head(line.text, item.start), line, place, "task", section)
        elif first:
            entry = self.listed(item, first, place, section, within, rhythm or _Rhythm())
        if entry is not None:
            if state and not entry.task.symbol:
                entry = self.entries[-1] = replace(entry, task=replace(entry.task, state=state))
            self.nested(item.children, entry)
        return entry

    def _box_is_entry(self, line: tasks.Line, item: Block, boxes: bool, within: Entry | None) -> bool:
        """A box is a paper when it names one, or stands among those that do."""
        if self._marked(item):
            return True
        head = self.head(line.text, item.start)
        fields = line.task.priority != "normal" or any(vars(line.task.dates).values())
        if within is not None:
            named = bool(head.links) or bool(from_text(line.text)) or fields
            return named or (not _has_own(within) and not _CHORE.match(line.text))
        if head.papers:
            return True
        linked = any(link.url for link in head.links)
        if linked:
            return boxes or self.all.papers > 0
        return boxes and not (self.all.papers and _CHORE.match(line.text) and not fields)

    def listed(
        self, item: Block, first: str, place: tuple[int, int, int], section: tuple[str, ...], within: Entry | None,
        rhythm: _Rhythm,
    ) -> Entry | None:  # fmt: skip
        """The entry that an item without a box is."""
        line = tasks.peel(first)
        bold = first.startswith(("**", "__"))
        linked = "](" in first or "://" in first or "<a " in first
        if (
            not linked
            and not bold
            and not rhythm.papers
            and "doi" not in first.lower()
            and "arxiv" not in first.lower()
        ):
            return None
        head = self.head(line.text, item.start)
        below = self._labels_below(item) if len(item.children) > 1 or "\n" in _content(item) else []
        papers = head.papers or any(lines_.leads_to_paper(k.url, k.label) for k in below)
        if within is not None:
            return self._within(item, first, line, head, place, section, within)
        if lines_.is_label(head.title) or pages.label_links(self.lines[item.start]):
            return None
        if bold and (entry := self._bold(item, first, line, head, place, section, None)):
            return entry
        lists = [child for child in item.children if child.kind == "list"]
        if papers and _is_entry(head):
            shape = "bold" if bold else "list"
            return self.make(head, line, place, shape, section)
        if papers and not head.papers and not _is_sentence(first):
            return self.make(head, line, place, "list", section)
        if head.style == "link" and _external(tuple(head.links)):
            if lists and not papers and any(self.rhythm(child).papers for child in lists):
                return None
            elsewhere = any(
                lines_._NO_PAPER.search(link.url.split("://")[-1].removeprefix("www.")) for link in head.links
            )
            usual = rhythm.papers * 5 >= rhythm.items * 3 and rhythm.items > 2
            most = self.all.papers >= self.all.links and (lines_.is_title(head.title) or not elsewhere)
            titled = lines_.is_title(head.title) and not elsewhere and (self.reading or not self.doubtful())
            if usual or most or titled:
                return self.make(head, line, place, "list", section)
            return None
        local = rhythm.local * (2 if lines_.is_title(head.title) else 1) * 5 >= rhythm.items * 3
        if head.style == "link" and local and rhythm.local:
            if self.reading and not head.links[0].url.startswith("#"):
                return self.make(head, line, place, "list", section)
            return None
        usual = rhythm.papers >= 2 and rhythm.papers * 5 >= rhythm.items * 3
        if lists and not head.links and any(self.rhythm(child).papers for child in lists):
            return None
        named = lines_.is_title(head.title) or bool(head.authors) or bool(head.year and head.title)
        prose = _is_sentence(first) and not head.authors
        if usual and named and not prose and not first.rstrip().endswith(":"):
            return self.make(head, line, place, "bold" if bold else "list", section)
        if head.links and head.style == "labels" and named and (rhythm.papers * 3 >= rhythm.items or self.reading):
            return self.make(head, line, place, "list", section)
        return None

    def _bold(self, item, first, line, head, place, section, within) -> Entry | None:
        """An item that opens with a bold title: a year, a link, or an identifier beside it tells that it is one."""
        match = _BOLD.match(first)
        if match is None or lines_._LABEL_WORD.match(match["title"].rstrip(":") + ":"):
            return None
        direct = next((child.start for child in item.children if child.kind == "list"), item.end)
        linked = any(link.url for link in head.links)
        if not (match["year"] or linked or self._own(item.start + 1, direct) or from_text(match["after"])):
            return None
        if within is None and linked and not match["year"] and not head.papers and self.doubtful():
            return None
        if linked and not _is_entry(head) and not match["year"]:
            return None
        titled = not match["title"].rstrip().endswith(":") or "](" in match["title"] or lines_.is_title(head.title)
        if not match["year"] and (not titled or (match["title"].endswith(":") and not head.papers and not linked)):
            return None
        if linked and not head.papers and not match["year"]:
            labelled = "](" in match["title"] or any(lines_.is_label(k.label) and k.label for k in head.links)
            if match["title"].rstrip().endswith(":") or not labelled:
                return None
        head = replace(head, title=head.title.strip("\\*").strip())
        return self.make(head, line, place, "bold", section, within)

    def _within(self, item, first, line, head, place, section, within: Entry) -> Entry | None:
        """An item inside an entry's text: a bold title among bold ones, or a paper with notes of its own."""
        if first.startswith(("**", "__")) and within.origin.shape == "bold":
            return self._bold(item, first, line, head, place, section, within)
        shown = inline(line.text)
        paper = any(from_url(link.url) for link in shown.links)
        if not (_bare(shown) and paper and (item.end - item.start > 1 or not _has_own(within))):
            return None
        if shown.links[0].label and lines_.is_label(shown.links[0].label):
            return None
        return self.make(head, line, place, "list", section, within)

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
        self, head: lines_.Head, line: tasks.Line, place: tuple[int, int, int], shape: str,
        section: tuple[str, ...] | None = None, within: Entry | None = None,
    ) -> Entry:  # fmt: skip
        """An entry of a line and of the lines [body, end) below it."""
        start, end, body = place
        if shape == "task":
            head = lines_.informal(replace(head), inline(line.text))
        while end > start + 1 and (len(self.lines[end - 1]) > LONG or not self.lines[end - 1].strip()):
            end -= 1
        body = min(body, end)
        nested = [line for line in self.lines[body:end] if len(line) <= LONG]
        rode = carrier.take(nested[-1])[1] if nested else None
        if rode is not None and within is None:
            self.carried[start + 1] = rode
            nested = nested[:-1]
        links = [link for link in head.links if link.url]
        first_item = next((n for n in range(body, end) if _LIST_MARK.match(self.lines[n])), end)
        if not any(lines_.leads_to_paper(link.url, link.label) for link in links):
            links += self._own(body, first_item) if not links else ()
            told = [link for row in nested[:8] if "://" in row for link in pages.label_links(row)]
            links += [link for link in told if link.label]
        links = list({link.url: link for link in reversed(links)}.values())[::-1]
        title = head.title
        if not title or (lines_.is_label(title) and links and not title.startswith("http") and within is None):
            title = title or next((link.url for link in links), "")
        ids = unique([*(from_url(link.url) for link in links), *from_text(line.text)])
        below = self._told(nested)
        ids = ids or below.ids
        known = {link.url for link in links}
        rest = [head.summary] if head.summary else []
        others = [link for link in head.mentions if link.url not in known]
        others += [link for link in inline(line.text).links if link.role != "own"]
        links += [link for link in others if link.url not in known]
        known |= {link.url for link in others}
        links += [link for link in mentions(nested) if link.url not in known]
        section = self.section if section is None else section
        origin = Origin(
            self.path, start + 1, end, body + 1 if body < end else 0, section, shape,
            within.origin.line if within else 0, self.written[start],
        )  # fmt: skip
        task = replace(line.task, dates=replace(line.task.dates, noted=head.noted or self.day or ""))
        task = self.stated(task, section, line.tags)
        year = head.year or below.year or year_of(ids) or (self.year if within is None else None)
        reference = Reference(
            title, head.name, head.authors or below.authors, year, head.venue or below.venue, ids, tuple(links)
        )
        entry = Entry(reference, task, self._all_tags(line.tags, section), _join(rest, dedent(nested)), origin)
        for problem in line.problems:
            self.remark(start, start + 1, problem)
        self.entries.append(entry)
        return entry

    def _told(self, nested: list[str]) -> Reference:
        """Authors, year, venue and ids that the first lines below a title tell."""
        authors, year, venue, ids = (), None, "", ()
        for row in nested[:6]:
            text = row.strip(" \t>-*+\\_")
            if not text or len(text) > 400:
                continue
            if ":" in text[:30]:
                found = pages.task_spec({}, [row])
                authors = authors or pages._people(found)
                year = year or lines_._any_year(found.first("year") or found.first("date"))
                venue = venue or found.first("venue")
                ids = ids or pages._ids(found)
            elif "](" in text and lines_._badge(said := text.split("[")[0].strip(" .,;"), lines_.Head()):
                year, venue = year or lines_._any_year(said), venue or lines_._less_year(said).strip(" .,")
            elif not authors and text[0].isupper() and not _NO_NAMES.search(text) and ("," in text or " " in text):
                shown = inline(text).text
                if lines_.are_people(lines_._less_year(shown)):
                    authors = lines_.names.people(lines_._less_year(shown))
                    year = year or lines_._any_year(shown[-8:])
        return Reference("", authors=authors, year=year, venue=venue, ids=ids)

    def stated(self, task: Task, section: tuple[str, ...], own: tuple[str, ...] = ()) -> Task:
        """A task whose state, where no box says it, is that of its tags or of the heading above it."""
        if task.state or task.symbol:
            return task
        known = next((pages._READ_TAGS[tag.casefold()] for tag in own if tag.casefold() in pages._READ_TAGS), "")
        known = known or next((state for text in reversed(section) if (state := _state_of(text))), "")
        return replace(task, state=known) if known else task

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


_NO_NAMES = re.compile(r"[?!$={}+^]|\b[a-z]{4,}\b.*\b[a-z]{4,}\b.*\b[a-z]{4,}\b")
"""What no line of names holds: signs, or three longer words in small letters."""


def _content(item: Block) -> str:
    return item.children[0].content if item.children and item.children[0].kind in ("paragraph", "heading") else ""


def _opens(content: str) -> bool:
    return content.lstrip().startswith(("**", "__", "[", '"', "“")) or bool(re.match(r"\s*(?:\d+[.)]|\S+, )", content))


def _goes_on(first: str, following: str, rest: list[str]) -> bool:
    """Whether a line of an item is the wrapped end of the one before: a bracket or bold words are open, or a title in
    small letters goes on before its links."""
    if carrier.MARK in following:
        return False
    if first.count("[") > first.count("]") or first.count("**") % 2 or re.search(r"\]\([^()\s]*$", first):
        return True
    if (
        "](" in first
        or "://" in first
        or first.endswith(("\\", ".", ":", "!", "?", "**"))
        or _LIST_MARK.match(following)
    ):
        return False
    long = len(first) >= 70 and bool(re.search(r"\w$", first)) and lines_.is_title(following.split("](")[0])
    return (following[:1].islower() or long) and any("](" in row or "://" in row for row in rest[:3])


def _is_paper(head: lines_.Head) -> bool:
    return head.papers and bool(head.title) and not lines_.is_label(head.title) and _is_entry(head)


def _is_entry(head: lines_.Head) -> bool:
    """Whether a line that links to a paper is about that paper, and does not only mention it."""
    words = len(head.title.split())
    if head.style in ("link", "bold", "quote", "wiki"):
        return True
    if all(re.fullmatch(r"\W*\d*\W*", link.label) and link.label for link in head.links) and head.links:
        return False  # a footnote's number
    return words <= (30 if head.style == "labels" else 16) and not _is_sentence(head.title)


def _is_sentence(text: str) -> bool:
    """Whether words are prose about papers rather than a title: a verb of the reader's, in small letters."""
    if lines_.is_title(text):
        return False
    words = text.split()
    prose = re.search(
        r"(?i)\b(?:we|they|it|this|these|i|you|is|are|was|were|has|have|can|shows?|uses?|see|also|which|that|if)\b",
        text,
    )
    return (len(words) > 6 and bool(prose)) or len(words) > 30


def _state_of(heading: str) -> str:
    """The read state that a heading says its entries have."""
    text = re.sub(r"[^\w\s'-]|\(?\d+\)?", " ", heading).strip()
    text = " ".join(text.split())
    return next((state for state, words in _STATE_HEADINGS if re.fullmatch(words, text, re.I)), "")


def _bare(shown: Inline) -> bool:
    """Nothing but one link."""
    return bool(shown.lead) and not shown.after.strip(" .\\") and shown.links[0].role == "own"


def _has_own(entry: Entry) -> bool:
    return any(link.role == "own" for link in entry.reference.links)


def _external(links: tuple[Link, ...]) -> bool:
    return any(link.role == "own" and link.url.lower().startswith(("http://", "https://")) for link in links)


def _join(first: list[str], rest: str) -> str:
    return "\n".join([*filter(None, first), *([rest] if rest else [])])
