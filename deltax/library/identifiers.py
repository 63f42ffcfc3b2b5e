"""Identifiers in links and text: arXiv (old and new), OpenReview, DOI."""

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import parse_qs, unquote, urlsplit

from deltax.library.model import Identifier

_NEW = r"\d{4}\.\d{4,5}"
_OLD = r"[a-z-]+(?:\.[A-Z]{2})?/\d{7}"
_ARXIV = re.compile(rf"(?P<id>{_NEW}|{_OLD})(?P<version>v\d+)?")
_ARXIV_PATH = re.compile(rf"(?:abs|pdf|html|papers|src)/(?P<id>{_NEW}|{_OLD})(?P<version>v\d+)?(?=\.pdf|/|$|[^\w.])")
_ARXIV_HOSTS = ("arxiv.org", "alphaxiv.org", "ar5iv.org", "ar5iv.labs.arxiv.org")
_ARXIV_TEXT = re.compile(rf"\barxiv\s*:\s*(?P<id>{_NEW}|{_OLD})(?P<version>v\d+)?(?![\w/])", re.I)
_ARXIV_DOI = re.compile(r"10\.48550/arxiv\.", re.I)
_DOI = re.compile(r"10\.\d{4,9}/[^\s\"<>{}]+")
_DOI_TEXT = re.compile(r"\bdoi\s*:\s*(10\.\d{4,9}/[^\s\"<>{}]+)", re.I)
_OPENREVIEW_ID = re.compile(r"[\w-]{6,}")
_TRAILING = ".,;:!?'\"*_\\"
EXAMPLES = {"arxiv": "arxiv:2503.10622", "doi": "doi:10.1145/3292500.3330701", "openreview": "openreview:AL1fq05o7H"}
URL = re.compile(r"https?://[^\s<>\"`]+", re.I)


def arxiv(text: str) -> Identifier | None:
    """`text` as an arXiv id, with or without a version; None when it is none. Months run from 01 to 12."""
    match = _ARXIV.fullmatch(text.strip().removesuffix(".pdf"))
    return _arxiv_from(match) if match else None


def _arxiv_from(match: re.Match) -> Identifier | None:
    value = match["id"]
    month = value.split("/")[-1][2:4]
    return Identifier("arxiv", value, match["version"] or "") if "01" <= month <= "12" else None


def doi(text: str) -> Identifier | None:
    """`text` as a DOI (case does not matter in one); arXiv's own DOIs become arXiv ids."""
    text = unquote(text.strip()).rstrip(_TRAILING)
    if not _DOI.fullmatch(text):
        return None
    if prefix := _ARXIV_DOI.match(text):
        return arxiv(text[prefix.end() :])
    return Identifier("doi", text.lower())


def from_url(url: str) -> Identifier | None:
    """The paper that a URL names, or None."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    host = (parts.hostname or "").removeprefix("www.").removeprefix("export.")
    path = unquote(parts.path)
    if host in _ARXIV_HOSTS or (host == "huggingface.co" and path.startswith("/papers/")):
        match = _ARXIV_PATH.search(path)
        return _arxiv_from(match) if match else None
    if host in ("openreview.net", "api2.openreview.net"):
        forum = parse_qs(parts.query).get("id", [""])[0]
        return Identifier("openreview", forum) if _OPENREVIEW_ID.fullmatch(forum) else None
    if host in ("doi.org", "dx.doi.org"):
        return doi(path.lstrip("/"))
    if match := re.search(r"/doi/(?:abs/|full/|pdf/|epdf/)?(10\.\d{4,9}/.+)", path):
        return doi(match[1].rstrip("/"))
    return None


def from_text(text: str) -> tuple[Identifier, ...]:
    """Identifiers written out in prose: `arXiv:2503.10622v2`, `doi:10.1000/x`, and those of its URLs."""
    found = [from_url(url) for url in urls(text)]
    found += [_arxiv_from(match) for match in _ARXIV_TEXT.finditer(text)]
    found += [doi(match[1]) for match in _DOI_TEXT.finditer(text)]
    return unique(found)


def parse(text: str) -> Identifier | None:
    """One identifier as a person types it: `arxiv:2503.10622`, `2503.10622v2`, `doi:10.1/x`, `openreview:ID`, a URL."""
    text = text.strip()
    scheme, _, rest = text.partition(":")
    if text.lower().startswith(("http://", "https://")):
        return from_url(text)
    if scheme.lower() == "arxiv":
        return arxiv(rest)
    if scheme.lower() == "doi":
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
    found = []
    for match in URL.finditer(text):
        url = match[0].rstrip(_TRAILING)
        for opening, closing in ("()", "[]"):
            while url.endswith(closing) and url.count(closing) > url.count(opening):
                url = url[:-1].rstrip(_TRAILING)
        found.append(url)
    return found


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
