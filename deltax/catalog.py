"""The papers, read by their syntax tree: listing, searching and drawing them loads no torch.

There is no registry. A paper is a file under `papers/FIELD/` or `papers/FIELD/FAMILY/`; it descends from what its
`@paper(on=...)` names. Its claims are the file at the same place under `claims/`.
"""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from deltax.errors import UserError, nearest
from deltax.home import cache as cache_folder
from deltax.paper import kind
from deltax.whole import whole

PAPERS = Path(__file__).parent / "papers"


@dataclass(frozen=True)
class ClaimRecord:
    """A claim as its file states it. `kind` is exact, parity or measured."""

    name: str
    kind: str
    says: str
    line: int
    paper: str = ""
    peer: str = ""

    def is_asked(self, word: str | None) -> bool:
        """Whether `word` is its name, in either spelling; None asks for every claim."""
        return word is None or word.replace("-", "_") == self.name


@dataclass(frozen=True)
class Record:
    """What a paper's file says of itself, without running it.

    `sentence` is "X, but Y"; `on` are the keys of its X, `replaces` those of the deltas in whose place it stands,
    `imports` those of the papers whose code it uses. `module` holds the Y, `claims_module` its claims. `family` is the
    folder inside the field, empty where the field has none.
    """

    key: str
    title: str
    authors: str
    year: int
    field: str
    family: str
    kind: str
    sentence: str
    prose: str
    module: str
    function: str
    path: Path
    arxiv: str | None
    url: str | None
    whole: str | None
    trains: bool
    on: tuple[str, ...]
    replaces: tuple[str, ...]
    imports: tuple[str, ...]
    claims: tuple[ClaimRecord, ...]

    @property
    def claims_module(self) -> str:
        return self.module.replace("deltax.papers.", "deltax.claims.", 1)

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url or ""

    def change(self) -> str:
        """The source of the Y alone: the file without its docstring and imports."""
        tree, lines = ast.parse(self.source), self.source.splitlines()
        kept = [n for n in tree.body if not _is_frame(n)]
        return "\n\n\n".join("\n".join(lines[_first_line(n) - 1 : n.end_lineno]) for n in kept)


@cache
def papers() -> dict[str, Record]:
    """Every paper by key, oldest first. A file that has not changed since it was last read is not parsed again."""
    memory = cache_folder() / f"catalogue-{crc32(bytes(PAPERS)):08x}.json"
    kept = _remembered(memory)
    files = {str(path): _stamp(path, claims_of(path)) for path in PAPERS.rglob("*.py") if path.name != "__init__.py"}
    read_again = [f for f, stamp in files.items() if f not in kept or kept[f][0] != stamp]
    found = {f: kept[f][1] for f in files if f not in read_again} | {f: read(Path(f)) for f in read_again}
    if read_again or kept.keys() - files:
        _remember(memory, {f: (files[f], record) for f, record in found.items()})
    return {r.key: r for r in sorted(found.values(), key=lambda r: (r.year, r.key))}


def find(key: str) -> Record:
    """The paper of this key. Raises UserError with the nearest key."""
    everything = papers()
    key = key.strip().replace("_", "-")
    if key not in everything:
        raise UserError(f"there is no paper {key!r}{nearest(key, everything)} ('dx list' shows all)")
    return everything[key]


def children(key: str) -> list[str]:
    """The keys of the papers that build on this one."""
    return [r.key for r in papers().values() if key in r.on]


def shown_on(record: Record, known: Mapping[str, Record]) -> str:
    """The recipe that a delta is shown on: the one it names, or its X where that is one, or gpt."""
    return record.whole or next((p for p in record.on if p in known and known[p].kind == "recipe"), "gpt")


def use(record: Record, known: Mapping[str, Record]) -> str:
    """The line that a reader of this paper would type next: a delta is compared with the recipe it is shown on, or
    only shown beside it where it cannot be trained."""
    if record.kind == "delta":
        whole = shown_on(record, known)
        if whole not in known or record.key not in known[whole].imports:  # else that recipe has it
            return f"dx {'compare' if record.trains else 'diff'} {whole} {whole}+{record.key}"
    if record.kind == "recipe":
        return f"dx train {record.key}"
    return f"from {record.module} import {record.function}"


def read(path: Path) -> Record:
    """One paper's record. Raises UserError, naming the file and what it lacks."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not a Python file: {error}") from None
    function, declared = _declaration(tree, path)
    first, sentence, prose = _docstring(tree, path)
    parents = _imports(tree)
    folders = path.relative_to(PAPERS).parts[:-1] if path.is_relative_to(PAPERS) else (path.parent.name,)
    authors, _, _ = first[1].rpartition(",")
    parameters = function.args.posonlyargs + function.args.args
    optional = len(parameters) - len(function.args.defaults)
    shape = [(a.arg, i >= optional) for i, a in enumerate(parameters)]
    shape += [(a.arg, d is not None) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)]
    return Record(
        key=path.stem.replace("_", "-"),
        title=first[0],
        authors=authors.strip(),
        year=declared["year"],
        field=folders[0],
        family=".".join(folders[1:]),
        kind=kind(shape, ast.unparse(function.returns) if function.returns else ""),
        sentence=sentence,
        prose=prose,
        module=".".join(("deltax", "papers", *folders, path.stem)),
        function=function.name,
        path=path,
        arxiv=declared.get("arxiv"),
        url=declared.get("url"),
        whole=declared.get("whole"),
        trains=declared.get("trains", True),
        on=tuple(parents[name] for name in declared.get("on", ()) if name in parents),
        replaces=tuple(parents[name] for name in declared.get("replaces", ()) if name in parents),
        imports=tuple(dict.fromkeys(parents.values())),
        claims=tuple(_claims(claims_of(path))),
    )


def claims_of(path: Path) -> Path:
    """The file that holds a paper's claims: the one at the same place under `claims/`, which need not exist. A paper
    outside the house holds its claims itself.
    """
    return PAPERS.with_name("claims") / path.relative_to(PAPERS) if path.is_relative_to(PAPERS) else path


def _stamp(*paths: Path) -> list[int]:
    found = [path.stat() for path in paths if path.exists()]
    return [number for stat in found for number in (stat.st_mtime_ns, stat.st_size)]


def _remembered(memory: Path) -> dict[str, tuple[list[int], Record]]:
    """File -> stamp and record, as this very reader wrote them; empty when there is nothing to trust."""
    try:
        stored = json.loads(memory.read_text(encoding="utf-8"))
        if stored["reader"] != _stamp(Path(__file__)):
            return {}
        return {file: (stamp, _record(words)) for file, (stamp, words) in stored["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(memory: Path, files: dict[str, tuple[list[int], Record]]) -> None:
    """Whole or not at all: where nothing can be written, the next start only takes longer."""
    words = {file: (stamp, {**asdict(record), "path": file}) for file, (stamp, record) in files.items()}
    with contextlib.suppress(OSError), whole(memory) as scratch:
        scratch.write_text(json.dumps({"reader": _stamp(Path(__file__)), "files": words}), encoding="utf-8")


def _record(words: dict[str, Any]) -> Record:
    lists = {"on": tuple(words["on"]), "replaces": tuple(words["replaces"]), "imports": tuple(words["imports"])}
    claims = tuple(ClaimRecord(**c) for c in words["claims"])
    return Record(**{**words, **lists, "path": Path(words["path"]), "claims": claims})


def evidence(key: str) -> dict[str, Any]:
    """What is stored under `evidence/` for a paper; empty when nothing was measured yet."""
    path = evidence_folder() / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def evidence_folder() -> Path:
    """`evidence/` beside the package in a checkout; beside the user's work otherwise."""
    checkout = Path(__file__).parent.parent / "evidence"
    return checkout if checkout.is_dir() else Path("evidence")


def counts(record: Record) -> dict[str, int]:
    """How much evidence of each kind stands: claims that run with the tests, and results that are stored."""
    stored = evidence(record.key)
    kinds = [c.kind for c in record.claims]
    return {
        "exact": kinds.count("exact"),
        "parity": kinds.count("parity"),
        "measured": len(stored.get("measured", {})),
        "speed": len(stored.get("speed", {})),
    }


def _declaration(tree: ast.Module, path: Path) -> tuple[ast.FunctionDef, dict[str, Any]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for d in node.decorator_list:
                if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "paper":
                    words: dict[str, Any] = {}
                    for k in d.keywords:
                        if k.arg in ("on", "replaces"):
                            items = k.value.elts if isinstance(k.value, ast.Tuple) else [k.value]
                            words[k.arg] = [n.id for n in items if isinstance(n, ast.Name)]
                        elif k.arg:
                            words[k.arg] = ast.literal_eval(k.value)
                    return node, words
    raise UserError(f"{path.name} declares no paper: decorate its Y with @paper(on=..., year=...)")


def _docstring(tree: ast.Module, path: Path) -> tuple[tuple[str, str], str, str]:
    text = ast.get_docstring(tree) or ""
    head, *rest = [" ".join(block.split()) for block in text.split("\n\n")]
    found = re.match(r"(?P<title>.+?[.?!]) (?P<authors>.+?,? (?:19|20)\d\d)\.", head)
    if not found or not rest:
        raise UserError(
            f"{path.name}: the docstring begins 'Title. Authors, year. arXiv:id', then, one line below, 'X, but Y.'"
        )
    return (found["title"].rstrip("."), found["authors"]), rest[0], "\n\n".join(rest[1:])


def _imports(tree: ast.Module) -> dict[str, str]:
    """Local name -> key of the paper it comes from, for imports at the top of the file."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltax.papers."):
            steps = (node.module or "").split(".")[2:]
            is_folder = PAPERS.joinpath(*steps).is_dir()  # then what is imported is a paper's module
            for alias in node.names:
                stem = alias.name if is_folder else steps[-1]
                found[alias.asname or alias.name] = stem.replace("_", "-")
    return found


def _claims(path: Path) -> list[ClaimRecord]:
    found: list[ClaimRecord] = []
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return found
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} of the claims is not a Python file: {error}") from None
    for node in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
        for d in node.decorator_list:
            call = d.func if isinstance(d, ast.Call) else d
            if ast.unparse(call).split(".")[0] != "claim":
                continue
            kind = call.attr if isinstance(call, ast.Attribute) else "exact"
            words = {k.arg: ast.literal_eval(k.value) for k in d.keywords if k.arg} if isinstance(d, ast.Call) else {}
            says = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            found.append(ClaimRecord(node.name, kind, says, node.lineno, **words))
    return found


def _is_frame(node: ast.stmt) -> bool:
    """The docstring, the imports, and claims where a paper outside the house holds its own."""
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    decorators = (d.func if isinstance(d, ast.Call) else d for d in getattr(node, "decorator_list", ()))
    is_claim = any(ast.unparse(d).split(".")[0] == "claim" for d in decorators)
    return is_docstring or is_claim or isinstance(node, (ast.Import, ast.ImportFrom))


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])
