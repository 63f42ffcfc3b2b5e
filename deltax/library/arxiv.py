"""Metadata from arXiv's API, only when asked for: one connection, a request every three seconds, kept for ever.

The manners are those of info.arxiv.org/help/api/tou. Each batch is stored as it comes, so a run that breaks off goes on
where it stopped.
"""

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from xml.etree import ElementTree
from xml.parsers import expat

from deltax.errors import UserError
from deltax.library.identifiers import arxiv as parse_id
from deltax.library.store import Library

API = "https://export.arxiv.org/api/query"
SECONDS = 3.0
"""Between two requests of all processes of this user."""

BATCH = 50
_LARGEST = 16 << 20
_ATOM = "{http://www.w3.org/2005/Atom}"
_ARXIV = "{http://arxiv.org/schemas/atom}"

Fetch = Callable[[str], bytes]
"""URL -> body. Raises OSError when there is no answer."""


@dataclass(frozen=True)
class Metadata:
    """What arXiv says of a paper (CC0). `id` has no version; `year` is that of the first version."""

    id: str
    title: str
    authors: tuple[str, ...]
    year: int
    summary: str
    doi: str = ""
    journal: str = ""
    category: str = ""


def get(url: str) -> bytes:
    """The body at `url`. Raises OSError."""
    request = urllib.request.Request(url, headers={"User-Agent": "deltax (reading notes; asked for by a person)"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read(_LARGEST + 1)
    except http.client.HTTPException as error:
        raise OSError(f"the answer broke off: {type(error).__name__}") from None


def cached(library: Library, ids: Iterable[str]) -> dict[str, Metadata]:
    """What the library already knows, by id. Never touches the network."""
    found = {}
    for identifier in ids:
        row = library.db.execute("SELECT record FROM metadata WHERE id=?", (identifier,)).fetchone()
        if row:
            values = json.loads(row[0])
            found[identifier] = Metadata(**{**values, "authors": tuple(values["authors"])})
    return found


def fetch(
    library: Library, ids: Iterable[str], get: Fetch = get, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Metadata]:
    """Metadata of arXiv ids (without versions), from the library where it is known, else from the API.

    Ids that arXiv does not know are missing from the answer. Raises UserError when arXiv cannot be reached or answers
    with something else; what came before stays stored.
    """
    wanted = list(dict.fromkeys(ids))
    for identifier in wanted:
        if parse_id(identifier) is None:
            raise UserError(f"{identifier!r} is no arXiv id: write it as 2503.10622 or hep-th/9901001")
    found = cached(library, wanted)
    missing = [identifier for identifier in wanted if identifier not in found]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        query = urllib.parse.urlencode({"id_list": ",".join(batch), "max_results": len(batch)})
        with _turn(library, sleep):
            try:
                body = get(f"{API}?{query}")
            except urllib.error.HTTPError as error:
                wait = "wait some minutes and run it again" if error.code in (429, 503) else "run it again later"
                raise UserError(
                    f"arXiv answered {error.code} after {len(found)} of {len(wanted)} papers: {wait}"
                ) from None
            except OSError as error:
                reason = getattr(error, "reason", error)
                raise UserError(f"arXiv cannot be reached ({reason}): what was fetched is kept, run it again") from None
        records = {record.id: record for record in parse(body) if record.id in batch}
        with library.writing():
            library.db.executemany(
                "INSERT OR REPLACE INTO metadata VALUES (?,?,?)",
                [(r.id, json.dumps(asdict(r), ensure_ascii=False), time.time()) for r in records.values()],
            )
        found |= records
    return found


def parse(body: bytes) -> list[Metadata]:
    """Papers of an Atom answer. Raises UserError for anything else, and for XML that declares a document type."""
    if len(body) > _LARGEST:
        raise UserError(f"arXiv's answer is larger than {_LARGEST >> 20} MB: nothing was read")
    _harmless(body)
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise UserError(f"arXiv's answer is no Atom ({error}): run it again later") from None
    found = []
    for entry in root.iter(f"{_ATOM}entry"):
        match = re.search(r"/abs/(.+?)(?:v\d+)?$", _text(entry, f"{_ATOM}id"))
        year = re.match(r"\d{4}", _text(entry, f"{_ATOM}published"))
        if match is None or year is None:
            continue
        category = entry.find(f"{_ARXIV}primary_category")
        found.append(
            Metadata(
                id=match[1],
                title=_text(entry, f"{_ATOM}title"),
                authors=tuple(_text(author, f"{_ATOM}name") for author in entry.iter(f"{_ATOM}author")),
                year=int(year[0]),
                summary=_text(entry, f"{_ATOM}summary"),
                doi=_text(entry, f"{_ARXIV}doi"),
                journal=_text(entry, f"{_ARXIV}journal_ref"),
                category=category.get("term", "") if category is not None else "",
            )
        )
    return found


def _harmless(body: bytes) -> None:
    """Entities can only be declared in a document type: refuse those before the tree is built."""
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise UserError("arXiv's answer declares a document type: nothing was read")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(body, True)
    except expat.ExpatError as error:
        raise UserError(f"arXiv's answer is no XML ({error}): run it again later") from None


def _text(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


@contextlib.contextmanager
def _turn(library: Library, sleep: Callable[[float], None]) -> Iterator[None]:
    """One request at a time over all processes, SECONDS after the one before."""
    with (library.path.parent / "arxiv.lock").open("a+") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:
            pass
        row = library.db.execute("SELECT value FROM meta WHERE key='arxiv'").fetchone()
        left = SECONDS - (time.time() - float(row[0])) if row else 0.0
        if left > 0:
            sleep(min(left, SECONDS))
        try:
            yield
        finally:
            with library.writing():
                library.db.execute("INSERT OR REPLACE INTO meta VALUES ('arxiv', ?)", (str(time.time()),))
