"""Bibliographies in and out: BibTeX by bibtexparser, RIS by rispy, CSL-JSON, and the CSV files of Zotero.

Natively, each carries title, short name, authors, year, venue, identifiers, the first link, tags and text; BibTeX also
carries every field it came with. The rest rides in `deltax` (BibTeX), `custom` (CSL-JSON) or a note (RIS).
"""

import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from typing import Any

from deltax.errors import UserError
from deltax.library import names, tables, tasks
from deltax.library.identifiers import from_fields, normal_title, url_of
from deltax.library.model import Entry, Link, Origin, Reference, Task

Parsed = tuple[Entry, str | None]
"""An entry as the format says it, at its line where the parser tells it (else 0), and what rode along."""

_USED = {"title", "shorttitle", "author", "year", "date", "journal", "journaltitle", "booktitle", "doi", "url"}
_USED |= {"eprint", "archiveprefix", "eprinttype", "keywords", "annote", "deltax", "arxivid"}
_OTHERS = "and-others"
"""The `extra` of a list of authors that goes on: BibTeX's "and others"."""

_KINDS = (
    ("article", "article-journal", "JOUR"),
    ("inproceedings", "paper-conference", "CONF"),
    ("conference", "paper-conference", "CONF"),
    ("proceedings", "book", "CONF"),
    ("incollection", "chapter", "CHAP"),
    ("inbook", "chapter", "CHAP"),
    ("book", "book", "BOOK"),
    ("phdthesis", "thesis", "THES"),
    ("mastersthesis", "thesis", "THES"),
    ("thesis", "thesis", "THES"),
    ("techreport", "report", "RPRT"),
    ("report", "report", "RPRT"),
    ("online", "webpage", "ELEC"),
    ("software", "software", "COMP"),
    ("dataset", "dataset", "DATA"),
    ("unpublished", "manuscript", "UNPB"),
    ("misc", "article", "GEN"),
)
"""One kind of publication as BibTeX, CSL and RIS call it."""

_FORMS = ("type", "csl-type", "ris-type")
_RIDES = "deltax: "
_RIS_USED = {"title", "primary_title", "short_title", "authors", "first_authors", "year", "publication_year", "id"}
_RIS_USED |= {"journal_name", "secondary_title", "alternate_title3", "doi", "accession_number", "urls", "keywords"}
_RIS_USED |= {"notes", "type_of_reference", "date"}


_SMALL = {"the", "for", "and", "with", "from", "into", "are", "how", "what", "why", "can", "does", "towards", "toward"}


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
    """Author, year and the first word that says something: he2015deep."""
    first = names.shown(reference.authors[0].split(",")[0]) if reference.authors else names.Name("")
    if reference.authors and isinstance(reference.authors[0], names.Name):
        first = reference.authors[0]
    words = [w for w in re.split(r"[^\w]+", reference.title) if len(w) > 2 and w.casefold() not in _SMALL]
    words = words or [reference.title]
    ascii_only = normal_title(first.family.split(" ")[-1]) + str(reference.year or "") + normal_title(words[0])
    return re.sub(r"[^a-z0-9]", "", ascii_only) or "entry"


# BibTeX.


def write_bibtex(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    import bibtexparser
    from bibtexparser.model import Entry as Block
    from bibtexparser.model import Field

    library = bibtexparser.Library()
    for entry, key, packed in zip(entries, keys(entries), carried, strict=True):
        ref = entry.reference
        fields = {"title": _to_latex(ref.title), "author": _bibtex_authors(ref)}
        fields |= {"year": str(ref.year or ""), "shorttitle": _to_latex(ref.name)}
        fields["journal"] = _to_latex(ref.venue)
        for identifier in ref.ids:
            if identifier.scheme == "arxiv" and "eprint" not in fields:
                fields |= {"eprint": identifier.value + identifier.version, "archiveprefix": "arXiv"}
            elif identifier.scheme == "doi" and "doi" not in fields:
                fields["doi"] = identifier.value
        fields |= {"url": _first_url(ref), "keywords": ", ".join(_to_latex(t) for t in entry.tags)}
        fields["annote"] = _balanced(entry.text)
        own = {"deltax", "citekey", _OTHERS, *_FORMS}
        extra = {k: _balanced(v) for k, v in ref.extra if re.fullmatch(r"[a-z][\w-]*", k) and k not in own}
        extra = {k: v for k, v in extra.items() if not fields.get(k)}
        fields = {k: v for k, v in {**fields, **extra, "deltax": packed}.items() if v}
        if (
            ref.venue
            and "booktitle" not in fields
            and kind_of(ref, 0) in ("inproceedings", "conference", "incollection")
        ):
            fields = {"booktitle" if k == "journal" else k: v for k, v in fields.items()}
        kind = kind_of(ref, 0)
        kind = kind if re.fullmatch(r"[a-z]+", kind) and kind not in ("comment", "string", "preamble") else "misc"
        library.add(Block(kind, key, [Field(k, f"{{{v}}}") for k, v in fields.items()]))
    return bibtexparser.write_string(library, unparse_stack=[])


def kind_of(reference: Reference, form: int) -> str:
    """What a format calls this kind of publication: `form` 0 is BibTeX, 1 CSL, 2 RIS."""
    extra = dict(reference.extra)
    if own := extra.get(_FORMS[form]):
        return own
    for other, name in enumerate(_FORMS):
        row = next((row for row in _KINDS if row[other] == extra.get(name)), None)
        if row:
            return row[form]
    return _KINDS[-1][form]


def _bibtex_authors(reference: Reference) -> str:
    written = []
    for author in map(names.shown, reference.authors):
        if author.literal and (" " in author.literal or "," in author.literal):
            written.append(f"{{{_to_latex(author.literal)}}}")
        else:
            written.append(_to_latex(author.inverted))
    return " and ".join([*written, *(["others"] if dict(reference.extra).get(_OTHERS) else [])])


def read_bibtex(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    """Entries, and (line, reason, text) of the blocks that are none, and of what had to be mended in the others."""
    import bibtexparser
    from bibtexparser.model import DuplicateBlockKeyBlock, DuplicateFieldKeyBlock

    logging.getLogger("bibtexparser").setLevel(logging.CRITICAL)  # what it cannot read becomes a remark
    text, failed = _with_commas(text)
    library = bibtexparser.parse_string(text)
    blocks = [(block.start_line or 0, block) for block in library.entries]
    strings = "\n".join(block.raw or "" for block in library.strings)
    values_of = {block.key.lower(): str(block.value) for block in library.strings}
    for bad in library.failed_blocks:
        line, raw = bad.start_line or 0, bad.raw or ""
        if isinstance(bad, DuplicateFieldKeyBlock):
            failed.append((line + 1, f"{bad.ignore_error_block.key} has a field twice: both are kept", raw))
            blocks.append((line, _bare_fields(bad.ignore_error_block)))
        elif isinstance(bad, DuplicateBlockKeyBlock):
            again = bibtexparser.parse_string(f"{strings}\n{raw}")
            blocks += [(line, block) for block in again.entries]
            twice = [b for b in again.failed_blocks if isinstance(b, DuplicateFieldKeyBlock)]
            blocks += [(line, _bare_fields(b.ignore_error_block)) for b in twice]
        else:
            reason = getattr(bad.error, "abort_reason", None) or bad.error
            failed.append((line + 1, f"BibTeX that cannot be read: {_one_line(reason)}", raw))
    found: list[Parsed] = []
    for line, block in sorted(blocks, key=lambda pair: pair[0]):
        values: dict[str, str] = {}
        for field in block.fields:
            key, value = field.key.lower(), _unwrapped(str(field.value), values_of)
            if key in _JOINTS and values.get(key, value) != value:
                value = f"{values[key]}{_JOINTS[key]}{value}"
            elif key in values:
                key = next(f"{key}-{n}" for n in range(2, len(block.fields) + 2) if f"{key}-{n}" not in values)
            values[key] = value
        if not values.get("title", "").strip():
            failed.append((line + 1, f"{block.key} has no title: kept", block.raw or ""))
            continue
        found.append((_from_bibtex(block.entry_type.lower(), block.key, values, line + 1), values.get("deltax")))
    return found, failed


_JOINTS = {"keywords": "; ", "author": " and ", "url": "\n"}
"""How the values of a field that is given twice are one; of the others the first counts and the second is `extra`."""


def _bare_fields(block: Any) -> Any:
    """The block with its fields' own braces or quotes off: the parser leaves them on where a field is repeated."""
    for field in block.fields:
        value = str(field.value).strip()
        if (value.startswith("{") and _closing(value) == len(value) - 1) or re.fullmatch(r'"[^"]*"', value):
            field.value = value[1:-1]
    return block


_NO_COMMA = re.compile(r"(?P<end>[}\"])(?P<space>[ \t]*\n?[ \t]*)(?P<key>[A-Za-z][\w-]*[ \t]*=[ \t]*[{\"])")


def _with_commas(text: str) -> tuple[str, list[tuple[int, str, str]]]:
    """The text with a comma between two fields where one was forgotten, each told by its line."""
    if "=" not in text:
        return text, []
    failed, out, at = [], [], 0
    for match in itertools.islice(_NO_COMMA.finditer(text), 1000):
        if not _between_fields(text, match.start("end")):
            continue
        out.append(text[at : match.end("end")] + ",")
        at = match.end("end")
        line = text.count("\n", 0, at) + 1
        failed.append(
            (line, f"a comma is missing before {match['key'].split('=')[0].strip()}: read as if it stood there", "")
        )
    return "".join([*out, text[at:]]) if out else text, failed


def _between_fields(text: str, end: int) -> bool:
    """Whether the brace or quote at `end` closes a field's value, by the braces since the entry's head."""
    head = max(
        (m.start() for m in re.finditer(r"(?m)^[ \t]*@\w+[ \t]*\{", text[max(0, end - 100_000) : end])), default=-1
    )
    if head < 0:
        return False
    part = text[max(0, end - 100_000) + head : end + 1]
    return len(part) - len(part.replace("{", "")) - (len(part) - len(part.replace("}", ""))) == 1


def _unwrapped(value: str, strings: dict[str, str]) -> str:
    """A field's text. `"a " # name # {b}` is joined."""
    if "#" not in value:
        return value
    pieces = re.findall(r'"(?:[^"{}]|\{[^{}]*\})*"|\{(?:[^{}]|\{[^{}]*\})*\}|[\w.:-]+|#', value)
    if "#" not in pieces or "".join(pieces).replace(" ", "") != value.replace(" ", "").replace("\n", ""):
        return value
    parts = [piece for piece in pieces if piece != "#"]
    if len(parts) != pieces.count("#") + 1:
        return value
    return "".join(p[1:-1] if p[0] in '"{' else strings.get(p.lower(), p) for p in parts)


def _from_bibtex(kind: str, key: str, values: dict[str, str], line: int) -> Entry:
    written = [name for name in _bibtex_names(values.get("author", "")) if name.strip()]
    more = bool(written) and written[-1].strip().casefold() in ("others", "et al", "et al.")
    links = tuple(Link(url) for url in dict.fromkeys(values.get("url", "").split("\n")) if url)
    ids = from_fields(values.items())
    reference = Reference(
        title=_from_latex(_unmarked(values["title"])),
        name=_from_latex(values.get("shorttitle", "")),
        authors=tuple(_bibtex_name(name) for name in (written[:-1] if more else written)),
        year=_year(values.get("year") or values.get("date", "")),
        venue=_from_latex(values.get("journal") or values.get("journaltitle") or values.get("booktitle", "")),
        ids=ids,
        links=links,
        extra=tuple((k, v) for k, v in values.items() if k not in _USED),
    )
    extra = reference.extra + _left(values, ids, ("doi", "eprint", "eprinttype"))
    date = values.get("date", "")
    extra += (("date", date),) if date and date != str(reference.year) else ()
    if values.get("journal") and values.get("booktitle"):
        extra += (("booktitle", values["booktitle"]),)
    extra += ((_OTHERS, "true"),) if more else ()
    if kind != "misc":
        extra = (("type", kind), *extra)
    if not re.fullmatch(re.escape(made_key(reference)) + r"(-\d+)?", key):
        extra = (("citekey", key), *extra)
    tags = tuple(filter(None, (_from_latex(t).strip() for t in re.split("[,;]", values.get("keywords", "")))))
    return Entry(replace(reference, extra=extra), tags=tags, text=values.get("annote", ""), origin=Origin(line=line))


def _left(values: dict[str, str], ids: Sequence[Any], fields: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Fields for identifiers that name none here (an eprint at HAL, a DOI that is none): kept as they came."""
    scheme = {"doi": {"doi", "arxiv"}}
    have = {i.scheme for i in ids}
    kept = [k for k in fields if values.get(k) and not have & scheme.get(k, {"arxiv"})]
    return tuple((k, values[k]) for k in kept)


def _bibtex_names(text: str) -> list[str]:
    """Names between " and " outside braces."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"[{}]|\s+and(?=\s)", text):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
        elif depth <= 0:
            found.append(text[start : match.start()])
            start = match.end()
    return [*found, text[start:]]


def _bibtex_name(text: str) -> names.Name:
    """A name; what stands in braces as a whole is a literal, or one part: `{Garc{\\'i}a M{\\'a}rquez}, Gabriel`."""
    text = text.strip()
    if text.startswith("{") and _closing(text) == len(text) - 1:
        return names.Name(_from_latex(text[1:-1]))
    if "," not in re.sub(r"\{[^{}]*\}", "", text) and (whole := re.search(r"\s(\{[^\\][^{}]*\s[^{}]*\})$", text)):
        return names.Name(_from_latex(whole[1]), _from_latex(text[: whole.start()]))
    return names.inverted(_from_latex(text))


def _closing(text: str) -> int:
    """Where the brace that opens the text is closed."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return at
    return -1


def _unmarked(title: str) -> str:
    """A title without HTML tags and entities, as some exporters leave them in."""
    if "<" not in title and "&" not in title:
        return title
    title = re.sub(
        r"</?(?:i|b|em|strong|sub|sup|span|scp|tt|u|p|br|jats:\w+|mml:\w+)(?:\s[^<>]*)?/?>", "", title, flags=re.I
    )
    return re.sub(r"(?<!\\)&(?:amp;)?(#\d+|#x[\da-f]+|[a-z]{2,8});", lambda m: unescape(f"&{m[1]};"), title, flags=re.I)


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
        item: dict[str, Any] = {"id": key, "type": kind_of(ref, 1), "title": ref.title}
        item["title-short"] = ref.name
        item["author"] = [_csl_name(name) for name in ref.authors]
        item["issued"] = {"date-parts": [_date_parts(ref)]} if ref.year else None
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
        rest = "\n".join(line for line in lines if not _NOTED.fullmatch(line.strip())).strip()
        url = str(item.get("URL") or "")
        extra = _extra(item, {*used, "note", "annote", "custom"})
        if item.get("type", "article") != "article":
            extra.insert(0, ("csl-type", str(item["type"])))
        if rest:
            extra.insert(0, ("note", rest))
        if (day := _iso(item.get("issued"))) and len(day) > 4:
            extra.append(("date", day))
        reference = Reference(
            title=_one_line(_unmarked(str(item["title"]))),
            name=str(item.get("title-short") or ""),
            authors=tuple(filter(None, map(_name_of, _listed(item.get("author"))))),
            year=_year(json.dumps(item.get("issued"))),
            venue=str(item.get("container-title") or ""),
            ids=(ids := from_fields((k, v) for k, v in item.items() if isinstance(v, str))),
            links=(Link(url),) if url else (),
            extra=(*extra, *_left({"DOI": str(item.get("DOI") or "")}, ids, ["DOI"])),
        )
        if not re.fullmatch(re.escape(made_key(reference)) + r"(-\d+)?", str(item.get("id", ""))):
            reference = replace(reference, extra=(("citekey", str(item.get("id", ""))), *reference.extra))
        words = ",".join(map(str, _listed(item.get("keyword"))))
        tags = tuple(t.strip() for t in words.split(",") if t.strip())
        custom = item.get("custom")
        packed = custom.get("deltax") if isinstance(custom, dict) else None
        found.append((Entry(reference, tags=tags, text=str(item.get("annote") or "")), packed))
    return found, failed


_NOTED = re.compile(r"(?:(?i:arxiv)|openreview):\s*\S+(?:\s*\[[\w.-]+\])?")
"""An identifier on a line of Zotero's Extra field: `arXiv: 2503.10622 [cs.LG]`."""


def _csl_name(name: str) -> dict[str, str]:
    name = names.shown(name)
    if name.literal:
        return {"literal": name.literal}
    parts = {"family": name.family, "given": name.given, "non-dropping-particle": name.particle, "suffix": name.suffix}
    return {key: value for key, value in parts.items() if value}


def _listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list, nothing as an empty one: files that break CSL's schema hold either."""
    return value if isinstance(value, list) else [value] if value else []


def _name_of(name: Any) -> str:
    if not isinstance(name, dict):
        return names.inverted(str(name))
    if name.get("literal"):
        return names.Name(str(name["literal"]))
    part = {key: str(value) for key, value in name.items() if value}
    particles = (part.get("dropping-particle"), part.get("non-dropping-particle"))
    family = part.get("family", "")
    particle = " ".join(filter(None, particles))
    if not particle and family:
        particle = names.inverted(f"{family}, x").particle
        family = names.inverted(f"{family}, x").family
    return names.Name(family, part.get("given", ""), particle, part.get("suffix", ""))


def _date_parts(reference: Reference) -> list[int]:
    """Year, month and day as far as `extra` knows them."""
    match = re.match(r"(\d{4})-(\d{1,2})(?:-(\d{1,2}))?$", dict(reference.extra).get("date", ""))
    if match is None or int(match[1]) != reference.year:
        return [reference.year or 0]
    return [int(part) for part in match.groups() if part]


def _iso(issued: Any) -> str:
    """CSL's date as ISO text, as precise as it is."""
    if not isinstance(issued, dict):
        return ""
    raw = str(issued.get("raw") or issued.get("literal") or "")
    parts = _listed(issued.get("date-parts"))
    parts = parts[0] if parts and isinstance(parts[0], list) else []
    try:
        numbers = [int(part) for part in parts[:3]]
    except (TypeError, ValueError):
        return raw
    if len(numbers) < 2:
        return raw if re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", raw) else ""
    return "-".join([f"{numbers[0]:04}", *(f"{n:02}" for n in numbers[1:])])


# RIS.


def write_ris(entries: Sequence[Entry], carried: Sequence[str]) -> str:
    import rispy

    items = []
    for entry, key, packed in zip(entries, keys(entries), carried, strict=True):
        ref = entry.reference
        accession = " ".join(f"{i.scheme}:{i.value}{i.version}" for i in ref.ids if i.scheme != "doi")
        item = {
            "type_of_reference": kind_of(ref, 2),
            "id": key,
            "title": _one_line(ref.title),
            "short_title": _one_line(ref.name),
            "authors": [_one_line(_ris_name(name)) for name in ref.authors],
            "year": str(ref.year or ""),
            "date": _ris_date(ref),
            "journal_name": _one_line(ref.venue),
            "doi": next((i.value for i in ref.ids if i.scheme == "doi"), ""),
            "accession_number": accession,
            "urls": list(dict.fromkeys(filter(None, [_first_url(ref), *_own_urls(ref)]))),
            "keywords": [_one_line(tag) for tag in entry.tags],
            "notes": [_one_line(entry.text, " / ")] * bool(entry.text) + [_RIDES + packed] * bool(packed),
        }
        items.append({k: v for k, v in item.items() if v})
    return rispy.dumps(items)


def read_ris(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    import rispy

    text = _ris_spaced(text.lstrip("\ufeff"))
    starts = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("TY  -")]
    if not starts and text.strip():
        raise UserError("this is no RIS: a record starts with a line 'TY  - JOUR'; export it again")
    try:
        items = rispy.loads(text)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"this is no RIS ({_one_line(error)}): export it again") from None
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
        links = tuple(Link(str(url)) for url in dict.fromkeys(item.get("urls", [])))
        fields = [("url", link.url) for link in links]
        fields += [(k, v) for k, v in item.items() if isinstance(v, str)]
        fields += [("note", note) for note in notes if not note.startswith(_RIDES)]
        ids = from_fields(fields)
        extra = _extra(item, _RIS_USED)
        if item.get("type_of_reference", "GEN") != "GEN":
            extra.insert(0, ("ris-type", str(item["type_of_reference"])))
        given = str(item.get("date") or item.get("publication_year") or item.get("year") or "")
        if match := re.match(r"(\d{4})[/-](\d{1,2})(?:[/-](\d{1,2}))?", given):
            extra.append(("date", "-".join(part.zfill(2) for part in match.groups() if part)))
        reference = Reference(
            title=_one_line(_unmarked(str(title))),
            name=str(item.get("short_title", "")),
            authors=tuple(names.inverted(str(n)) for n in [*item.get("authors", []), *item.get("first_authors", [])]),
            year=_year(str(item.get("year") or item.get("publication_year") or item.get("date") or "")),
            venue=str(item.get("journal_name") or item.get("secondary_title") or item.get("alternate_title3") or ""),
            ids=ids,
            links=links,
            extra=(*extra, *_left({"doi": str(item.get("doi", ""))}, ids, ["doi"])),
        )
        text_of = "\n".join(note for note in notes if not note.startswith(_RIDES))
        tags = tuple(item.get("keywords", ()))
        found.append((Entry(reference, tags=tags, text=text_of, origin=Origin(line=line)), packed))
    return found, failed


_RIS_LINE = re.compile(r"^([A-Z][A-Z0-9])[ \t]{0,4}-(?=[ \t]|$)", re.M)


def _ris_spaced(text: str) -> str:
    """RIS with the two blanks before each hyphen that the format has, in records whose first line has others."""
    parts = re.split(r"(?m)^(?=TY[ \t]{0,4}-)", text)
    return "".join(
        part if part.startswith("TY  -") or not part.startswith("TY") else _RIS_LINE.sub(r"\1  -", part)
        for part in parts
    )


def _ris_name(name: str) -> str:
    """`van der Maaten, Laurens, Jr.`: RIS has the suffix last."""
    name = names.shown(name)
    family = f"{name.particle} {name.family}".strip()
    return ", ".join(part for part in (family, name.given, name.suffix) if part)


def _ris_date(reference: Reference) -> str:
    parts = _date_parts(reference)
    return "/".join(f"{part:02}" for part in parts) if len(parts) > 1 else ""


def _own_urls(reference: Reference) -> list[str]:
    return [link.url for link in reference.links if link.role == "own"]


# CSV, in only.

_COLUMNS = {
    "title": ("title", "paper title", "paper", "papers", "article", "article title", "document title", "publication"),
    "name": ("short title", "model name"),
    "authors": ("author", "authors", "author(s)", "author full names", "creators"),
    "year": ("publication year", "year", "date", "published", "publication date", "pub year"),
    "venue": ("publication title", "venue", "journal", "conference name", "source title", "conference", "published in"),
    "doi": ("doi",),
    "url": ("url", "link", "links", "paper link", "link to paper", "paper url", "pdf", "pdf link", "source"),
    "arxiv": ("arxiv id", "arxiv", "arxivid"),
    "tags": ("manual tags", "tags", "keywords", "topics", "topic", "tag", "author keywords"),
    "text": ("notes", "note", "tldr", "tl;dr", "summary", "my notes", "comments", "comment", "takeaway"),
    "status": ("status", "state", "read", "read?"),
    "extra": ("extra",),
}


def read_csv(text: str) -> tuple[list[Parsed], list[tuple[int, str, str]]]:
    csv.field_size_limit(64 << 20)
    text = text.lstrip("\ufeff")
    head = text.partition("\n")[0]
    between = max(",;\t", key=lambda mark: head.count(mark))
    rows = csv.DictReader(io.StringIO(text), delimiter=between)
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
            ids = from_fields([(k, v) for k, v in value.items() if k not in ("text", "title")])
            extra = [(k, v) for k, v in row.items() if k and k not in used and v and isinstance(v, str)]
            noted = all(_NOTED.fullmatch(line.strip()) for line in value["extra"].split("\n"))
            extra += [("Extra", value["extra"])] if value["extra"] and not noted else []
            extra += _left(value, ids, ("doi", "arxiv"))
            state = tables.STATES.get(value["status"].casefold(), "")
            extra += [("status", value["status"])] if value["status"] and not state else []
            reference = Reference(
                title=_one_line(_unmarked(value["title"])),
                name=value["name"],
                authors=_people(value["authors"], "author" in header),
                year=_year(value["year"]),
                venue=value["venue"],
                ids=ids,
                links=(Link(value["url"]),) if value["url"] else (),
                extra=tuple(extra),
            )
            tags = tuple(t.strip() for t in re.split("[;,]", value["tags"]) if t.strip())
            task = Task(state, tasks.symbol_of(state) if state else "")
            found.append((Entry(reference, task, tags, value["text"], Origin(line=line)), None))
    except csv.Error as error:
        failed.append((rows.line_num, f"CSV that cannot be read from here on: {error}", ""))
    return found, failed


def _people(cell: str, zotero: bool) -> tuple[names.Name, ...]:
    """Zotero writes `Family, Given; Family, Given`; others also `Given Family, Given Family`."""
    return tuple(names.inverted(n) for n in cell.split(";") if n.strip()) if zotero else names.people(cell)


def _extra(item: dict[str, Any], used: set[str]) -> list[tuple[str, str]]:
    left = ((k, v) for k, v in item.items() if k not in used)
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in left]


def _first_url(reference: Reference) -> str:
    own = next((link.url for link in reference.links if link.role == "own"), "")
    return own or next((url_of(i) for i in reference.ids if i.scheme == "openreview"), "")


def _year(text: str) -> int | None:
    match = re.search(r"(?<!\d)(?:1[6-9]|20)\d{2}(?!\d)", text)
    return int(match[0]) if match else None


def _one_line(text: object, joint: str = " ") -> str:
    return joint.join(part.strip() for part in str(text).splitlines() if part.strip())
