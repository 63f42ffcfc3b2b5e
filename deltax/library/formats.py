"""Entries as files of other programs, and back without loss.

What a format carries by itself (NATIVE) is written as that format has it; each other field rides along (carrier.py).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from deltax.errors import UserError, nearest
from deltax.library import bibliography, carrier, readers, tasks
from deltax.library.files import split
from deltax.library.identifiers import url_of
from deltax.library.markdown import LONG
from deltax.library.model import Entry, Origin, Reading, Remark, flat, unflat
from deltax.library.tags import slug

_BIBLIOGRAPHIC = ("title", "name", "authors", "year", "venue", "first link", "tags")
NATIVE = {
    "bibtex": (*_BIBLIOGRAPHIC, "text", "ids: one arXiv, one DOI", "extra"),
    "csl": (*_BIBLIOGRAPHIC, "text", "ids"),
    "ris": (*_BIBLIOGRAPHIC, "text on one line", "ids"),
    "obsidian": (
        "title",
        "first link",
        "ids",
        "tags",
        "text",
        "state",
        "priority",
        "dates of Tasks",
        "fields",
        "section",
    ),
    "table": ("title", "name", "first link", "text on one line"),
}
SUFFIXES = {"bibtex": ".bib", "csl": ".json", "ris": ".ris", "obsidian": ".md", "table": ".md"}


_ENTRY_LIKE = re.compile(r"\[.\]|\]\(|https?://|\*\*|__|<!--")
"""Text in which a reader may see entries of their own: the comment says that there are none."""


def write(entries: Sequence[Entry], form: str) -> str:
    """Entries as a file of `form` (NATIVE). Raises UserError for an unknown form, or an entry too long for a table."""
    if form not in NATIVE:
        raise UserError(f"there is no format {form!r}{nearest(form, NATIVE)}: use one of {', '.join(NATIVE)}")
    entries = list(entries)
    writer, reader = _FORMS[form]
    parsed = reader(writer(entries, ["{}"] * len(entries)))
    if len(parsed) != len(entries):
        raise UserError(f"{len(entries)} entries would come back as {len(parsed)}: choose another format than {form}")
    carried = [carrier.pack(flat(seen), flat(entry)) for (seen, _), entry in zip(parsed, entries, strict=True)]
    return writer(entries, carried)


def read(text: str, form: str) -> list[Entry]:
    """The entries of a file that `write` made, or that another program did."""
    return [_whole(seen, packed) for seen, packed in _FORMS[form][1](text)]


def read_file(path: str, text: str) -> Reading:
    """A bibliography by its suffix, with remarks on what is none. Raises UserError when nothing can be read."""
    parse = {
        ".bib": bibliography.read_bibtex,
        ".json": bibliography.read_csl,
        ".ris": bibliography.read_ris,
        ".csv": bibliography.read_csv,
    }[Path(path).suffix.lower()]
    try:
        found, failed = parse(text)
    except UserError as error:
        return Reading(path, (), (Remark(path, 1, text.count("\n") + 1, str(error)),))
    entries = []
    for seen, packed in found:
        entry, line = _whole(seen, packed), seen.origin.line
        origin = Origin(path, line, line, 0, entry.origin.section, Path(path).suffix.lower()[1:])
        entries.append(Entry(entry.reference, entry.task, entry.tags, entry.text, origin))
    remarks = tuple(Remark(path, line, line, reason, raw) for line, reason, raw in failed)
    return Reading(path, tuple(entries), remarks)


def _whole(seen: Entry, packed: str | None) -> Entry:
    return unflat(carrier.unpack(packed, flat(seen))) if packed else seen


# Markdown.


def _write_obsidian(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    out: list[str] = []
    section: tuple[str, ...] = ()
    for entry, packed in zip(entries, carried, strict=True):
        wanted = tuple(" ".join(part.split()) for part in entry.origin.section)
        if wanted != section:
            shared = next((n for n, (a, b) in enumerate(zip(wanted, section, strict=False)) if a != b), len(wanted))
            start = min(shared, len(section)) if len(wanted) > len(section) else max(0, min(shared, len(wanted) - 1))
            out += [f"{'#' * min(2 + depth, 6)} {wanted[depth]}" for depth in range(start, len(wanted))]
            section = wanted
        slugs = {slug(part) for part in wanted}
        fields = tasks.render_fields(entry.task, tuple(t for t in entry.tags if t not in slugs))
        box = f"[{entry.task.symbol}] " if entry.task.symbol else ""
        out.append(f"- {box}{_title(entry)}{' ' + fields if fields else ''}")
        out += [f"\t{line}" if line else "" for line in entry.text.split("\n")] if entry.text else []
        if packed or not entry.task.symbol or _ENTRY_LIKE.search(entry.text):
            out.append(f"\t{carrier.comment(packed)}")
    return "\n".join(out) + "\n"


def _write_table(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    rows = ["| Paper title | Model name | Summary |", "|---|---|---|"]
    for entry, packed in zip(entries, carried, strict=True):
        text = "<br>".join(line.strip() for line in entry.text.split("\n"))
        cells = [_title(entry), _plain(entry.reference.name) or "-", text or "-"]
        row = "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        row += f" {carrier.comment(packed)} |" if packed or carrier.MARK in row else " |"
        if len(row) > LONG:
            raise UserError(f"{entry.title!r} is too long for a row of a table: choose --format obsidian or csl")
        rows.append(row)
    return "\n".join(rows) + "\n"


def _read_markdown(text: str) -> list[tuple[Entry, str | None]]:
    """Entries with what rode along already laid over them: the reader of notes does that."""
    return [(entry, None) for entry in readers.read("", split(text)).entries if not entry.origin.within]


def _title(entry: Entry) -> str:
    ref = entry.reference
    own = next((link.url for link in ref.links if link.role == "own"), "") or next((url_of(i) for i in ref.ids), "")
    title = _plain(ref.title)
    if not own or ref.title == own:
        return own or title
    return f"[{title}](<{own}>)" if any(c in own for c in "() ") else f"[{title}]({own})"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; LaTeX between dollars is left alone."""
    parts = " ".join(text.split()).split("$")
    return "$".join(part if n % 2 and n < len(parts) - 1 else _escape(part) for n, part in enumerate(parts))


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\[]*_`<" else c for c in text)


_FORMS: dict[str, tuple[Callable[[Sequence[Entry], Sequence[str]], str], Callable[[str], list]]] = {
    "bibtex": (bibliography.write_bibtex, lambda text: bibliography.read_bibtex(text)[0]),
    "csl": (bibliography.write_csl, lambda text: bibliography.read_csl(text)[0]),
    "ris": (bibliography.write_ris, lambda text: bibliography.read_ris(text)[0]),
    "obsidian": (_write_obsidian, _read_markdown),
    "table": (_write_table, _read_markdown),
}
