"""Identifiers in links and text: arXiv (old and new), OpenReview, DOI."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from html import unescape
from urllib.parse import parse_qs, unquote, urlsplit

from deltax.library.model import Identifier

_NEW = r"\d{4}\.\d{4,5}"
_OLD = r"[a-z-]+(?:\.[A-Za-z-]{2,})?/\d{7}"
_ID = rf"(?P<id>{_NEW}|{_OLD})(?P<version>v\d+)?"
_ARXIV = re.compile(rf"(?:arxiv\s*[:.]?\s*)?{_ID}(?:\s*\[[\w.-]+\])?", re.I)
_ARXIV_PATH = re.compile(rf"(?:^|/|arxiv:){_ID}(?=\.pdf|/|$|[^\w.])", re.I)
_ARXIV_HOSTS = re.compile(
    r"(?:[\w-]+\.)*(?:arxiv|alphaxiv|ar5iv|arxiv-vanity|arxiv-sanity|scirate|paperswithcode|emergentmind|deeplearn|"
    r"semanticscholar)\.(?:org|com|labs\.arxiv\.org)|xxx\.lanl\.gov|papers\.cool"
)
_ARXIV_TEXT = re.compile(
    rf"\b(?:arxiv(?:\s+e?-?(?:pre)?print)?\s*[:.\s]\s*(?:arxiv:\s*)?|(?:corr,?\s+)?(?<!/)abs/){_ID}(?![\w/])", re.I
)
_ARXIV_DOI = re.compile(r"10\.48550/arxiv\.", re.I)
_DOI = re.compile(r"10\.\d{4,9}/[^\s\"{}]+")
_DOI_TEXT = re.compile(r"(?<![\w./])10\.\d{4,9}/[^\s\"{}|]+")
_DOI_PREFIX = re.compile(r"(?:https?://)?(?:dx\.|www\.)?doi\.org/|doi\s*[:=]?\s*", re.I)
_DOI_PATH = re.compile(r"(?:^|/|=)(10\.\d{4,9}/.+)")
_DOI_SUFFIX = re.compile(r"(?:/(?:full|pdf|abstract|meta|epdf|html|summary)|\.full|\.pdf|\.abstract)+$", re.I)
_PREPRINT = re.compile(r"(10\.1101/[\d.]+)v\d+$")
_LATEX = re.compile(r"\{?\\([_&%#$<>])\}?|\$([<>])\$|\\(textless|textgreater)(?:\{\})?")
_OPENREVIEW_ID = re.compile(r"[\w-]{6,}")
_TRAILING = ".,;:!?'\"*_\\"
EXAMPLES = {"arxiv": "arxiv:2503.10622", "doi": "doi:10.1145/3292500.3330701", "openreview": "openreview:AL1fq05o7H"}
URL = re.compile(r"https?://[^\s<>\"`]+", re.I)

ARXIV_KEYS = {"arxiv", "arxivid", "arxiv_id", "arxiv-id", "arxiv id", "eprint"}
OPENREVIEW_KEYS = {"openreview", "openreview_id", "openreview-id"}
LINK_KEYS = {"url", "urls", "link", "links", "source", "paper", "pdf", "biburl", "ee", "openreview", "link to paper"}
PROSE_KEYS = {
    *(
        "journal",
        "journaltitle",
        "booktitle",
        "volume",
        "number",
        "pages",
        "note",
        "howpublished",
        "publisher",
        "extra",
    ),
    *("archive", "archive_location", "container-title", "accession_number", "publication title", "archivelocation"),
}
"""Fields in which programs put identifiers: for one scheme, for links, and prose that names one (Google Scholar's
`journal={arXiv preprint arXiv:1706.03762}`)."""


def arxiv(text: str) -> Identifier | None:
    """`text` as an arXiv id, with or without a version, prefix or class; None when it is none. Months run from 01 to
    12."""
    match = _ARXIV.fullmatch(text.strip().removesuffix(".pdf"))
    return _arxiv_from(match) if match else None


def _arxiv_from(match: re.Match) -> Identifier | None:
    value = match["id"]
    month = value.split("/")[-1][2:4]
    return Identifier("arxiv", value, match["version"] or "") if "01" <= month <= "12" else None


def doi(text: str) -> Identifier | None:
    """`text` as a DOI, in any spelling: bare, a URL, with `doi:`, as LaTeX or HTML escape it. Case does not matter in
    one; arXiv's own DOIs become arXiv ids."""
    text = _LATEX.sub(lambda m: m[1] or m[2] or {"textless": "<", "textgreater": ">"}[m[3]], text)
    text = unescape(unquote(text.strip().strip("<>{}")))
    text = _closed(text[match.end() :] if (match := _DOI_PREFIX.match(text)) else text)
    if not _DOI.fullmatch(text):
        return None
    if prefix := _ARXIV_DOI.match(text):
        return arxiv(text[prefix.end() :])
    return Identifier("doi", text.lower())


@lru_cache(maxsize=8192)
def from_url(url: str) -> Identifier | None:
    """The paper that a URL names, or None."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    host = (parts.hostname or "").removeprefix("www.").removeprefix("export.")
    path = unquote(parts.path)
    if _ARXIV_HOSTS.fullmatch(host) or (host in ("huggingface.co", "hf.co") and path.startswith("/papers/")):
        match = None if path.startswith("/list/") else _ARXIV_PATH.search(path)
        if match or "arxiv" in host:
            return _arxiv_from(match) if match else None
    if host in ("openreview.net", "api2.openreview.net", "api.openreview.net"):
        forum = parse_qs(parts.query).get("id", [""])[0]
        return Identifier("openreview", forum) if _OPENREVIEW_ID.fullmatch(forum) else None
    if host in ("doi.org", "dx.doi.org"):
        return doi(path.lstrip("/"))
    found = _DOI_PATH.search(path) or re.search(r"(?:^|&)(?:id|doi)=(10\.\d{4,9}/[^&]+)", unquote(parts.query))
    return doi(_PREPRINT.sub(r"\1", _DOI_SUFFIX.sub("", found[1].rstrip("/")))) if found else None


def from_text(text: str) -> tuple[Identifier, ...]:
    """Identifiers written out in prose: `arXiv:2503.10622v2`, `doi:10.1000/x`, a bare DOI, and those of its URLs."""
    found: list[Identifier | None] = []
    low = text.lower()
    if "://" in text:
        addresses = urls(text)
        found += [from_url(url) for url in addresses]
        for url in addresses:
            text = text.replace(url, " ")
    if "arxiv" in low or "abs/" in low:
        found += [_arxiv_from(match) for match in _ARXIV_TEXT.finditer(text)]
    if "10." in text:
        found += [doi(match[0]) for match in _DOI_TEXT.finditer(text)]
    return unique(found)


def from_fields(fields: Iterable[tuple[str, str]]) -> tuple[Identifier, ...]:
    """Identifiers of a record of any format, by the names of its fields: those of one scheme first, then links, then
    prose. What other fields say (an abstract, a summary) names other papers and is not looked through."""
    ranked: dict[int, list[Identifier | None]] = {0: [], 1: [], 2: [], 3: []}
    for name, value in fields:
        key, value = name.strip().casefold(), value.strip()
        if not value:
            continue
        if key in ARXIV_KEYS:
            ranked[0] += [arxiv(value) or from_url(value), *from_text(value)]
        elif key == "doi":
            ranked[1] += [doi(value) or from_url(value)] if doi(value) or from_url(value) else from_text(value)
        elif key in LINK_KEYS | OPENREVIEW_KEYS:
            bare = (
                Identifier("openreview", value) if key in OPENREVIEW_KEYS and _OPENREVIEW_ID.fullmatch(value) else None
            )
            ranked[2] += [bare or parse(value), *from_text(value)]
        elif key in PROSE_KEYS:
            ranked[3] += from_text(value)
            ranked[3] += [Identifier("openreview", i) for i in re.findall(r"\bopenreview:\s*([\w-]{6,})", value)]
    return unique(i for found in ranked.values() for i in found)


def _closed(text: str) -> str:
    """Without the punctuation that ends a sentence, or a bracket that was opened outside."""
    text = text.rstrip(_TRAILING)
    for opening, closing in ("()", "[]", "<>"):
        while text.endswith(closing) and text.count(closing) > text.count(opening):
            text = text[:-1].rstrip(_TRAILING)
    return text


def parse(text: str) -> Identifier | None:
    """One identifier as a person types it: `arxiv:2503.10622`, `2503.10622v2`, `doi:10.1/x`, `openreview:ID`, a URL."""
    text = text.strip()
    scheme, _, rest = text.partition(":")
    if text.lower().startswith(("http://", "https://")):
        return from_url(text)
    if scheme.lower() == "arxiv":
        return arxiv(rest)
    if scheme.strip().lower() == "doi":
        return doi(rest)
    if scheme.lower() == "openreview":
        return Identifier("openreview", rest.strip()) if _OPENREVIEW_ID.fullmatch(rest.strip()) else None
    return arxiv(text) or doi(text)


def url_of(identifier: Identifier) -> str:
    """The address of a paper's page."""
    value = identifier.value + identifier.version
    return {
        "arxiv": f"https://arxiv.org/abs/{value}",
        "openreview": f"https://openreview.net/forum?id={value}",
        "doi": f"https://doi.org/{value}",
    }[identifier.scheme]


def urls(text: str) -> list[str]:
    """Bare URLs in text, without the punctuation that ends a sentence or a bracket that was opened outside."""
    return [_closed(match[0]) for match in URL.finditer(text)]


def year_of(ids: Iterable[Identifier]) -> int | None:
    """The year in which a paper came to arXiv, as its id says it."""
    for identifier in ids:
        if identifier.scheme == "arxiv":
            two = int(identifier.value.split("/")[-1][:2])
            return (2000 if two < 91 else 1900) + two
    return None


def same_url(url: str) -> str:
    """A URL without what does not change the page: scheme, www, trailing slash, fragment, tracking."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    query = "&".join(q for q in parts.query.split("&") if q and not q.startswith("utm_"))
    host = (parts.netloc or "").lower().removeprefix("www.")
    return host + parts.path.rstrip("/") + (f"?{query}" if query else "")


def normal_title(title: str) -> str:
    """Letters and digits only, folded: equal for titles that differ in case, spacing, accents and punctuation."""
    folded = unicodedata.normalize("NFKD", title).casefold()
    return "".join(c for c in folded if c.isalnum())


def unique(found: Iterable[Identifier | None]) -> tuple[Identifier, ...]:
    """Without None and repeats; of two versions the first stays."""
    kept: dict[str, Identifier] = {}
    for identifier in found:
        if identifier is not None:
            kept.setdefault(identifier.key, identifier)
    return tuple(kept.values())
