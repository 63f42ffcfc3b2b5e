"""Bibliographies in and out: BibTeX by bibtexparser, RIS by rispy, CSL-JSON, and the CSV files of Zotero.

Natively, each carries title, short name, authors, year, venue, identifiers, the first link, tags and text; BibTeX also
carries every field it came with. The rest rides in `deltax` (BibTeX), `custom` (CSL-JSON) or a note (RIS).
"""

import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltax.errors import UserError
from deltax.library.identifiers import arxiv, doi, from_text, from_url, normal_title, unique, url_of
from deltax.library.model import Entry, Identifier, Link, Origin, Reference

Parsed = tuple[Entry, str | None]
"""An entry as the format says it, at its line where the parser tells it (else 0), and what rode along."""

_USED = {"title", "shorttitle", "author", "year", "date", "journal", "journaltitle", "booktitle", "doi", "url"}
_USED |= {"eprint", "archiveprefix", "eprinttype", "keywords", "annote", "deltax"}
_RIDES = "deltax: "
_RIS_USED = {"title", "primary_title", "short_title", "authors", "first_authors", "year", "publication_year", "id"}
_RIS_USED |= {"journal_name", "secondary_title", "alternate_title3", "doi", "accession_number", "urls", "keywords"}
_RIS_USED |= {"notes", "type_of_reference"}


def keys(entries: Sequence[Entry]) -> list[str]:
    """A citation key for each entry, all different: its own, or author, year and first word."""
    taken: set[str] = set()
    out = []
    for entry in entries:
        own = dict(entry.reference.extra).get("citekey", "")
        key = own if re.fullmatch(r"[^\s,{}\"#%~=\\]+", own) else made_key(entry.reference)
        number, base = 1, key
        while key.casefold() in taken:
            number += 1
            key = f"{base}-{number}"
        taken.add(key.casefold())
        out.append(key)
    return out


def made_key(reference: Reference) -> str:
    family = reference.authors[0].split(",")[0].split()[-1:] if reference.authors else []
    words = [w for w in re.split(r"[^\w]+", reference.title) if len(w) > 2] or [reference.title]
    ascii_only = normal_title("".join(family)) + str(reference.year or "") + normal_title(words[0])
    return re.sub(r"[^a-z0-9]", "", ascii_only) or "entry"


# BibTeX.


def write_bibtex(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    import bibtexparser
    from bibtexparser.model import Entry as Block
    from bibtexparser.model import Field

    library = bibtexparser.Library()
    for entry, key, packed in zip(entries, keys(entries), carried, strict=True):
        ref = entry.reference
        fields = {"title": _to_latex(ref.title), "author": " and ".join(_to_latex(a) for a in ref.authors)}
        fields |= {"year": str(ref.year or ""), "shorttitle": _to_latex(ref.name)}
        fields["journal"] = _to_latex(ref.venue)
        for identifier in ref.ids:
            if identifier.scheme == "arxiv" and "eprint" not in fields:
                fields |= {"eprint": identifier.value + identifier.version, "archiveprefix": "arXiv"}
            elif identifier.scheme == "doi" and "doi" not in fields:
                fields["doi"] = identifier.value
        fields |= {"url": _first_url(ref), "keywords": ", ".join(_to_latex(t) for t in entry.tags)}
        fields["annote"] = _balanced(entry.text)
        own = {*_USED, "citekey", "type"}
        extra = {k: _balanced(v) for k, v in ref.extra if re.fullmatch(r"[a-z][\w-]*", k) and k not in own}
        fields = {k: v for k, v in {**fields, **extra, "deltax": packed}.items() if v}
        kind = dict(ref.extra).get("type", "misc")
        kind = kind if re.fullmatch(r"[a-z]+", kind) and kind not in ("comment", "string", "preamble") else "misc"
        library.add(Block(kind, key, [Field(k, f"{{{v}}}") for k, v in fields.items()]))
    return bibtexparser.write_string(library, unparse_stack=[])


def read_bibtex(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    """Entries, and (line, reason, text) of the blocks that are none."""
    import bibtexparser
    from bibtexparser.model import DuplicateBlockKeyBlock

    logging.getLogger("bibtexparser").setLevel(logging.CRITICAL)  # what it cannot read becomes a remark
    library = bibtexparser.parse_string(text)
    blocks = [(block.start_line or 0, block) for block in library.entries]
    failed = []
    strings = "\n".join(block.raw or "" for block in library.strings)
    for bad in library.failed_blocks:
        line, raw = bad.start_line or 0, bad.raw or ""
        if isinstance(bad, DuplicateBlockKeyBlock):
            blocks += [(line, block) for block in bibtexparser.parse_string(f"{strings}\n{raw}").entries]
        else:
            reason = getattr(bad.error, "abort_reason", None) or bad.error
            failed.append((line + 1, f"BibTeX that cannot be read: {_one_line(reason)}", raw))
    found: list[Parsed] = []
    for line, block in sorted(blocks, key=lambda pair: pair[0]):
        values = {field.key.lower(): str(field.value) for field in block.fields}
        if not values.get("title", "").strip():
            failed.append((line + 1, f"{block.key} has no title: kept", block.raw or ""))
            continue
        found.append((_from_bibtex(block.entry_type.lower(), block.key, values, line + 1), values.get("deltax")))
    return found, failed


def _from_bibtex(kind: str, key: str, values: dict[str, str], line: int) -> Entry:
    names = re.split(r"\s+and\s+", values.get("author", ""))
    url = values.get("url", "")
    volume = values.get("volume", "")  # Semantic Scholar: journal = {ArXiv}, volume = {abs/1706.03762}
    ids = [arxiv(values.get("eprint", "").removeprefix("arXiv:")), doi(values.get("doi", "")), from_url(url)]
    ids += [arxiv(volume.removeprefix("abs/"))] if volume.startswith("abs/") else []
    reference = Reference(
        title=_from_latex(values["title"]),
        name=_from_latex(values.get("shorttitle", "")),
        authors=tuple(_first_last(_from_latex(name)) for name in names if name.strip()),
        year=_year(values.get("year") or values.get("date", "")),
        venue=_from_latex(values.get("journal") or values.get("journaltitle") or values.get("booktitle", "")),
        ids=unique([*ids, *from_text(values.get("note", ""))]),
        links=(Link(url),) if url else (),
        extra=tuple((k, v) for k, v in values.items() if k not in _USED),
    )
    extra = reference.extra
    if kind != "misc":
        extra = (("type", kind), *extra)
    if not re.fullmatch(re.escape(made_key(reference)) + r"(-\d+)?", key):
        extra = (("citekey", key), *extra)
    tags = tuple(filter(None, (_from_latex(t).strip() for t in re.split("[,;]", values.get("keywords", "")))))
    return Entry(replace(reference, extra=extra), tags=tags, text=values.get("annote", ""), origin=Origin(line=line))


def _to_latex(text: str) -> str:
    parts = re.split(r"(\$[^$]+\$)", text)
    special = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%#_"} | {"$": r"\$"}
    return _balanced("".join(p if n % 2 else "".join(special.get(c, c) for c in p) for n, p in enumerate(parts)), True)


def _from_latex(text: str) -> str:
    if not re.search(r"[\\{}~$]|--|``|''", text):
        return " ".join(text.split())
    from pylatexenc.latex2text import LatexNodes2Text

    try:
        plain = LatexNodes2Text(math_mode="verbatim", keep_comments=True).latex_to_text(text)
    except Exception:  # pylatexenc raises many kinds of errors on broken LaTeX; the source is then the best we have
        plain = text
    return " ".join(plain.split())


def _balanced(text: str, escaped: bool = False) -> str:
    """Text whose braces a BibTeX parser can count."""
    bare = re.sub(r"\\[{}]", "", text) if escaped else text
    depth = 0
    for char in bare:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            break
    if depth or (not escaped and re.search(r"\\[{}]", text)):
        return text.replace("{", "(").replace("}", ")")
    return text


# CSL-JSON.


def write_csl(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    items = []
    for entry, key, packed in zip(entries, keys(entries), carried, strict=True):
        ref = entry.reference
        item: dict[str, Any] = {"id": key, "type": dict(ref.extra).get("csl-type", "article"), "title": ref.title}
        item["title-short"] = ref.name
        item["author"] = [_csl_name(name) for name in ref.authors]
        item["issued"] = {"date-parts": [[ref.year]]} if ref.year else None
        item["container-title"] = ref.venue
        item["DOI"] = next((i.value for i in ref.ids if i.scheme == "doi"), "")
        item["note"] = "\n".join(f"{i.scheme}: {i.value}{i.version}" for i in ref.ids if i.scheme != "doi")
        item |= {"URL": _first_url(ref), "keyword": ", ".join(entry.tags), "annote": entry.text}
        item["custom"] = {"deltax": packed} if packed else None
        items.append({k: v for k, v in item.items() if v})
    return json.dumps(items, ensure_ascii=False, indent=2) + "\n"


def read_csl(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno} is not JSON ({error.msg}): export as CSL-JSON again") from None
    except RecursionError:
        raise UserError("this JSON is nested too deep to be a bibliography") from None
    items = items.get("items") if isinstance(items, dict) else items
    if not isinstance(items, list):
        raise UserError("this JSON is no CSL-JSON: it must be a list of items")
    found: list[Parsed] = []
    failed = []
    used = {"id", "type", "title", "title-short", "author", "issued", "container-title", "DOI", "URL", "keyword"}
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not str(item.get("title") or "").strip():
            failed.append((1, f"item {number} has no title: kept", json.dumps(item, ensure_ascii=False)))
            continue
        lines = str(item.get("note") or "").split("\n")
        noted = [_noted(line) for line in lines]
        rest = "\n".join(line for line, identifier in zip(lines, noted, strict=True) if identifier is None).strip()
        url = str(item.get("URL") or "")
        extra = _extra(item, {*used, "note", "annote", "custom"})
        if item.get("type", "article") != "article":
            extra.insert(0, ("csl-type", str(item["type"])))
        if rest:
            extra.insert(0, ("note", rest))
        reference = Reference(
            title=str(item["title"]),
            name=str(item.get("title-short") or ""),
            authors=tuple(filter(None, map(_name_of, _listed(item.get("author"))))),
            year=_year(json.dumps(item.get("issued"))),
            venue=str(item.get("container-title") or ""),
            ids=unique([*noted, doi(str(item.get("DOI") or "")), from_url(url)]),
            links=(Link(url),) if url else (),
            extra=tuple(extra),
        )
        if not re.fullmatch(re.escape(made_key(reference)) + r"(-\d+)?", str(item.get("id", ""))):
            reference = replace(reference, extra=(("citekey", str(item.get("id", ""))), *extra))
        words = ",".join(map(str, _listed(item.get("keyword"))))
        tags = tuple(t.strip() for t in words.split(",") if t.strip())
        custom = item.get("custom")
        packed = custom.get("deltax") if isinstance(custom, dict) else None
        found.append((Entry(reference, tags=tags, text=str(item.get("annote") or "")), packed))
    return found, failed


def _noted(line: str) -> Identifier | None:
    """An identifier on a line of Zotero's Extra field: `arXiv: 2503.10622 [cs.LG]`."""
    scheme, _, rest = line.partition(":")
    value = rest.strip().split(" ")[0]
    if scheme.strip().lower() == "arxiv":
        return arxiv(value)
    return Identifier("openreview", value) if scheme.strip() == "openreview" and value else None


def _csl_name(name: str) -> dict[str, str]:
    given, _, family = name.rpartition(" ")
    return {"family": family, "given": given} if given and family else {"literal": name}


def _listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list, nothing as an empty one: files that break CSL's schema hold either."""
    return value if isinstance(value, list) else [value] if value else []


def _name_of(name: Any) -> str:
    if not isinstance(name, dict):
        return str(name)
    if name.get("literal"):
        return str(name["literal"])
    parts = (name.get("given"), name.get("non-dropping-particle"), name.get("family"), name.get("suffix"))
    return " ".join(str(part) for part in parts if part)


# RIS.


def write_ris(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    import rispy

    items = []
    for entry, key, packed in zip(entries, keys(entries), carried, strict=True):
        ref = entry.reference
        accession = " ".join(f"{i.scheme}:{i.value}{i.version}" for i in ref.ids if i.scheme != "doi")
        item = {
            "type_of_reference": dict(ref.extra).get("ris-type", "GEN"),
            "id": key,
            "title": _one_line(ref.title),
            "short_title": _one_line(ref.name),
            "authors": [_one_line(_last_first(name)) for name in ref.authors],
            "year": str(ref.year or ""),
            "journal_name": _one_line(ref.venue),
            "doi": next((i.value for i in ref.ids if i.scheme == "doi"), ""),
            "accession_number": accession,
            "urls": [url for url in [_first_url(ref)] if url],
            "keywords": [_one_line(tag) for tag in entry.tags],
            "notes": [_one_line(entry.text, " / ")] * bool(entry.text) + [_RIDES + packed] * bool(packed),
        }
        items.append({k: v for k, v in item.items() if v})
    return rispy.dumps(items)


def read_ris(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    import rispy

    try:
        items = rispy.loads(text.lstrip("\ufeff"))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"this is no RIS ({_one_line(error)}): export it again") from None
    starts = [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\ufeff?TY  ?-", line)]
    lines = starts if len(starts) == len(items) else [0] * len(items)
    found: list[Parsed] = []
    failed = []
    for number, (line, item) in enumerate(zip(lines, items, strict=True), 1):
        title = item.get("title") or item.get("primary_title") or ""
        if not title:
            failed.append(
                (line, f"record {number} has no title: kept", json.dumps(item, ensure_ascii=False, default=str))
            )
            continue
        notes = [str(note) for note in item.get("notes", [])]
        packed = next((note.removeprefix(_RIDES) for note in notes if note.startswith(_RIDES)), None)
        url = next(iter(item.get("urls", [])), "")
        written = [_noted(word.replace(":", ": ", 1)) for word in str(item.get("accession_number", "")).split()]
        extra = _extra(item, _RIS_USED)
        if item.get("type_of_reference", "GEN") != "GEN":
            extra.insert(0, ("ris-type", str(item["type_of_reference"])))
        reference = Reference(
            title=str(title),
            name=str(item.get("short_title", "")),
            authors=tuple(_first_last(str(n)) for n in [*item.get("authors", []), *item.get("first_authors", [])]),
            year=_year(str(item.get("year") or item.get("publication_year") or "")),
            venue=str(item.get("journal_name") or item.get("secondary_title") or item.get("alternate_title3") or ""),
            ids=unique([*written, doi(str(item.get("doi", ""))), from_url(url)]),
            links=(Link(url),) if url else (),
            extra=tuple(extra),
        )
        text_of = "\n".join(note for note in notes if not note.startswith(_RIDES))
        tags = tuple(item.get("keywords", ()))
        found.append((Entry(reference, tags=tags, text=text_of, origin=Origin(line=line)), packed))
    return found, failed


# CSV, in only.

_COLUMNS = {
    "title": ("title", "paper title"),
    "name": ("short title", "model name"),
    "authors": ("author", "authors"),
    "year": ("publication year", "year", "date"),
    "venue": ("publication title", "venue", "journal", "conference name"),
    "doi": ("doi",),
    "url": ("url", "link"),
    "arxiv": ("arxiv id", "arxiv", "arxivid"),
    "tags": ("manual tags", "tags", "keywords"),
    "text": ("notes", "note", "tldr", "summary"),
    "extra": ("extra",),
}


def read_csv(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    csv.field_size_limit(64 << 20)
    rows = csv.DictReader(io.StringIO(text.lstrip("\ufeff")))
    header = {name.strip().casefold(): name for name in rows.fieldnames or () if name}
    columns = {key: [header[n] for n in names if n in header] for key, names in _COLUMNS.items()}
    if not columns["title"]:
        raise UserError("this CSV has no column Title: export from Zotero or Semantic Scholar with a header line")
    used = {column for found in columns.values() for column in found}
    found: list[Parsed] = []
    failed: list[tuple[int, str, str]] = []
    line, following = 1, 2
    try:
        for row in rows:
            line, following = following, rows.line_num + 1
            value = {
                k: next((row[c].strip() for c in names if (row[c] or "").strip()), "") for k, names in columns.items()
            }
            if not value["title"]:
                raw = json.dumps(list(row.values()), ensure_ascii=False)
                failed.append((line, "a row without a title: kept", raw))
                continue
            if surplus := row.get(None):
                failed.append((line, "more cells than the header has: kept", json.dumps(surplus, ensure_ascii=False)))
            noted = [_noted(line) for line in value["extra"].split("\n")]
            ids = unique([arxiv(value["arxiv"]), *noted, doi(value["doi"]), from_url(value["url"])])
            extra = [(k, v) for k, v in row.items() if k and k not in used and v and isinstance(v, str)]
            extra += [("Extra", value["extra"])] if value["extra"] and not all(noted) else []
            reference = Reference(
                title=value["title"],
                name=value["name"],
                authors=_people(value["authors"], "author" in header),
                year=_year(value["year"]),
                venue=value["venue"],
                ids=ids,
                links=(Link(value["url"]),) if value["url"] else (),
                extra=tuple(extra),
            )
            tags = tuple(t.strip() for t in re.split("[;,]", value["tags"]) if t.strip())
            found.append((Entry(reference, tags=tags, text=value["text"], origin=Origin(line=line)), None))
    except csv.Error as error:
        failed.append((rows.line_num, f"CSV that cannot be read from here on: {error}", ""))
    return found, failed


def _people(cell: str, zotero: bool) -> tuple[str, ...]:
    """Zotero writes `Family, Given; Family, Given`; others also `Given Family, Given Family`."""
    inverted = zotero or ";" in cell or (cell.count(",") == 1 and " " not in cell.partition(",")[0].strip())
    return tuple(_first_last(name) for name in cell.split(";" if inverted else ",") if name.strip())


def _extra(item: dict[str, Any], used: set[str]) -> list[tuple[str, str]]:
    left = ((k, v) for k, v in item.items() if k not in used)
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in left]


def _first_url(reference: Reference) -> str:
    own = next((link.url for link in reference.links if link.role == "own"), "")
    return own or next((url_of(i) for i in reference.ids if i.scheme == "openreview"), "")


def _first_last(name: str) -> str:
    family, comma, given = name.partition(",")
    return f"{given.strip()} {family.strip()}" if comma and given.strip() else name.strip().rstrip(",")


def _last_first(name: str) -> str:
    given, _, family = name.rpartition(" ")
    return f"{family}, {given}" if given and family else name


def _year(text: str) -> int | None:
    match = re.search(r"(?<!\d)(?:1[6-9]|20)\d{2}(?!\d)", text)
    return int(match[0]) if match else None


def _one_line(text: object, joint: str = " ") -> str:
    return joint.join(part.strip() for part in str(text).splitlines() if part.strip())
