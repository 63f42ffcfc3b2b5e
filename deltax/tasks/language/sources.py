"""Sources of text turned into documents: what Python carries, files, folders, data sets. Loads no torch."""

import gzip
import heapq
import json
import os
import stat
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from deltax.errors import DataWarning, UserError, nearest
from deltax.tasks.language.corpus import Corpus, Document

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
DEFAULT_BYTES = 10_000_000

# Left out of the default text: tests; the manual's topics, which are read as prose; tables of code pages, which repeat
# each other and would leak from training into evaluation; whatever differs between two installations of one Python.
_NOT_TEXT = {"test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__", "site-packages", "dist-packages"}
_OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


def load(source: str | None = None) -> Corpus:
    """The documents of a source, read once in a process as long as its files stay the same. All are held in memory.

    None or "default"   what every Python carries: the topics of its manual and the sources of its standard library
    "prose", "code"     one half of that: the topics alone, the sources alone (write ./prose for a file of that name)
    a file              .txt, .md, .py or any other UTF-8 text: one document; .jsonl, .parquet: one for each row, its
                        field `text` or its only string field; .gz of these
    a folder            all such files in it, sorted; hidden ones are passed over; those that cannot be read are
                        left out, with a warning, and listed in `Corpus.skipped`
    hf:NAME             a Hugging Face dataset; also hf:NAME:SPLIT and hf:NAME:CONFIG:SPLIT

    Raises UserError, one sentence with the fix, when the source is missing, empty, not text, or cannot be read.
    """
    if source is None or source in _KINDS:
        return _default() if source in (None, "default") else _default(source)
    if source.startswith("hf:"):
        return _hub(source)
    if not source.strip():
        raise UserError("the source of text is an empty string: name a file, a folder or hf:NAME")
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise UserError(_missing(path))
    root = Path(os.path.abspath(path))
    if root.is_dir():
        closed: list[str] = []
        files = tuple(map(_stamp, _walk(root, closed)))
        if not files:
            reason = f" ({'; '.join(closed)})" if closed else ""
            raise UserError(f"{path} holds no {', '.join(SUFFIXES)} or .gz of these{reason}: give a folder that does")
        corpus = _from_folder(root, files, tuple(closed))
    else:
        corpus = _from_file(_stamp(root))
    if corpus.skipped:
        shown, more = corpus.skipped[:10], len(corpus.skipped) - 10
        left = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
        warnings.warn(f"left out {left}", DataWarning, stacklevel=2)
    return corpus


@lru_cache(maxsize=3)
def _default(name: str = "default") -> Corpus:
    """Topics spread evenly among the sources, each in sorted order, up to the first that would pass 10 MB."""
    order = heapq.merge(*(_spread(list(documents())) for documents in _KINDS[name]))
    kept, room = [], DEFAULT_BYTES
    for _, document in order:
        room -= len(document[1])
        if room < 0:
            break
        kept.append(document)
    if not kept:
        missing = "its manual" if name == "prose" else "its sources"
        raise UserError(f"this Python was installed without {missing}: give a file or folder of text instead")
    half = "" if name == "default" else f", {name}"
    return Corpus.of(f"library of Python {sys.version_info.major}.{sys.version_info.minor}{half}", kept)


def _spread(documents: list[Document]) -> list[tuple[float, Document]]:
    return [((i + 0.5) / len(documents), document) for i, document in enumerate(documents)]


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some Linux distributions package it apart
        return
    for title in sorted(topics):
        yield f"topics/{title}", topics[title].encode()


def _library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, [], _NOT_TEXT):
        if path.suffix != ".py" or path.name.startswith(_OF_ONE_MACHINE) or path.parent.name.startswith("config-"):
            continue
        try:
            yield path.relative_to(root).as_posix(), _plain(path.name, path.read_bytes())
        except (OSError, UserError):
            continue


_KINDS = {"default": (_topics, _library), "prose": (_topics,), "code": (_library,)}

Stamp = tuple[Path, int, int]


def _stamp(path: Path) -> Stamp:
    """The path with its modification time and size: what tells a cached corpus from a changed one."""
    try:
        status = path.stat()
    except OSError:
        return path, -1, -1
    return path, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2)
def _from_file(file: Stamp) -> Corpus:
    path = file[0]
    return Corpus.of(path.name, _read(path, path.name))


@lru_cache(maxsize=2)
def _from_folder(root: Path, files: tuple[Stamp, ...], closed: tuple[str, ...]) -> Corpus:
    if any(_kind(path)[0] == ".parquet" for path, *_ in files):
        _pyarrow()
    name = root.name or str(root)
    documents, skipped = [], list(closed)
    for path, *_ in files:
        try:
            documents += _read(path, path.relative_to(root).as_posix())
        except UserError as error:
            skipped.append(str(error))
    if skipped and not documents:
        raise UserError(f"{name} holds no file that can be read: {'; '.join(skipped[:3])}")
    return Corpus.of(name, documents, skipped)


def _walk(root: Path, closed: list[str], skip: Iterable[str] = ()) -> Iterator[Path]:
    """Files of a known kind, sorted. A folder that cannot be listed adds a sentence to `closed`."""

    def tell(error: OSError):
        closed.append(f"{os.path.relpath(error.filename, root)} cannot be listed ({error.strerror})")

    for folder, inner, files in os.walk(root, onerror=tell):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in skip)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and _kind(path)[0] in SUFFIXES:
                yield path


def _kind(path: Path) -> tuple[str, bool]:
    """The suffix that says how to read a file, and whether the file is compressed."""
    name = path.name.lower()
    return os.path.splitext(name.removesuffix(".gz"))[1], name.endswith(".gz")


def _read(path: Path, name: str) -> list[Document]:
    """The documents of one file; `name` is what to call it. Raises UserError when it cannot be read."""
    suffix, compressed = _kind(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{name} is neither a file nor a folder: give one of these")
        data = path.read_bytes()
        if compressed and data:
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name} is not whole gzip data: compress or fetch it again") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): mend that or leave it out") from error
    if not data.strip():
        return []
    if suffix == ".parquet":
        return list(_parquet(name, data))
    text = _plain(name, data)
    return list(_lines(name, text)) if suffix == ".jsonl" else [(name, text)]


def _plain(name: str, data: bytes) -> bytes:
    if b"\0" in data:
        raise UserError(f"{name} is binary: give UTF-8 text ({', '.join(SUFFIXES)} or .gz of these)")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it, for example with iconv -t UTF-8"
        ) from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _lines(name: str, data: bytes) -> Iterator[Document]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON; write one object on each line") from error
        if not isinstance(row, dict):
            raise UserError(f'{where}: not an object; write {{"text": "..."}}')
        field = _field([key for key, value in row.items() if isinstance(value, str)], where)
        yield f"{name}:{number}", row[field].encode(errors="replace")


def _parquet(name: str, data: bytes) -> Iterator[Document]:
    pa, parquet = _pyarrow()

    def is_string(kind) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    try:
        table = parquet.ParquetFile(pa.BufferReader(data))
        column = _field([field.name for field in table.schema_arrow if is_string(field.type)], name)
        rows = table.read(columns=[column]).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a whole parquet file: write or fetch it again") from error
    return _rows(name, rows)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow: pip install 'deltax-ml[parquet]'") from error
    return pyarrow, pyarrow.parquet


@lru_cache(maxsize=1)
def _hub(source: str) -> Corpus:
    parts = source.split(":")[1:]
    if len(parts) > 3 or not all(parts):
        raise UserError(f"{source!r} is no dataset: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, *config, split = parts if len(parts) > 1 else [*parts, "train"]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install 'deltax-ml[hf]'") from error
    try:
        table = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, split or config
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{source} cannot be loaded ({reason}): check the name and the network, or give a local file"
        ) from error
    strings = [
        key for key, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    return Corpus.of(source, _rows(name, table[_field(strings, source)]))


def _rows(name: str, rows: Iterable[str | None]) -> Iterator[Document]:
    return ((f"{name}:{i}", text.encode(errors="replace")) for i, text in enumerate(rows) if text)


def _field(strings: list[str], where: str) -> str:
    """`text`, or else the only field that holds strings."""
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = f"{len(strings)} others ({', '.join(strings)})" if strings else "no other"
    raise UserError(f"{where}: no string field 'text', and {found}; name the one to read 'text'")


def _missing(path: Path) -> str:
    try:
        hint = nearest(path.name, os.listdir(path.parent))
    except OSError as error:
        why = f"{path.parent} cannot be listed ({error.strerror})"
        return f"no file or folder {path}: {why}; a Hugging Face dataset is hf:{path}"
    return f"no file or folder {path}{hint or '; give one that exists, or hf:NAME for a Hugging Face dataset'}"
