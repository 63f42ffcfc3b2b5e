"""What each `dx notes` command does, apart from how it is spelled and printed."""

import argparse
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from deltax.errors import UserError, nearest
from deltax.library import arxiv, formats, identifiers, printing, suggest, tasks, writeback
from deltax.library.importing import import_paths
from deltax.library.join import Catalogue, Joined, certain, decide, join
from deltax.library.marking import marks
from deltax.library.model import Entry, Link, Origin, Reference, Task
from deltax.library.sentences import questions as questions_of
from deltax.library.store import Item, Library


@dataclass(frozen=True)
class Result:
    """What to print: `text` for people, `data` for --json; `code` is the exit status."""

    text: str
    data: Any = None
    code: int = 0


def catalogue() -> Catalogue:
    """The papers that Δx has."""
    from deltax import catalog

    return Catalogue(catalog.papers().values())


def import_(library: Library, args: argparse.Namespace) -> Result:
    report = import_paths(library, args.paths, args.dry_run)
    data = {
        **{key: value for key, value in vars(report).items() if key != "remarks"},
        "remarks": [vars(remark) for remark in report.remarks],
        "dry_run": args.dry_run,
    }
    return Result(printing.report(report, args.dry_run, args.all), data)


def list_(library: Library, args: argparse.Namespace) -> Result:
    if args.remarks:
        remarks = library.remarks()
        return Result("\n".join(map(str, remarks)) or "every line is in an entry", [vars(r) for r in remarks])
    items = _chosen(library, args)
    joined = certain(library, catalogue(), items)
    data = [printing.data(item, joined.get(item.work)) for item in items]
    groups = [[item] for item in items] if args.entries else _groups(items)
    lines = [printing.line(group, joined.get(group[0].work)) for group in groups]
    return Result("\n".join([*lines, _sum(items)]), data)


def show(library: Library, args: argparse.Namespace) -> Result:
    item = find(library, args.entry)
    papers = catalogue()
    members = library.work(item.work)
    joined = join(library, papers, members).get(item.work)
    others = [other for other in members if other.id != item.id]
    text = printing.full(item, others, joined, _family(joined, papers))
    return Result(text, {**printing.data(item, joined), "others": [other.id for other in others]})


def search(library: Library, args: argparse.Namespace) -> Result:
    items = library.search(" ".join(args.query), args.limit)
    joined = certain(library, catalogue(), items)
    lines = [printing.line([item], joined.get(item.work)) for item in items]
    return Result("\n".join(lines) or "nothing found", [printing.data(i, joined.get(i.work)) for i in items])


def read(library: Library, args: argparse.Namespace) -> Result:
    item = find(library, args.entry)
    today = args.on or date.today().isoformat()
    found = marks(library, item, args.state, today)
    changed = []
    for mark in found:
        there = mark.item.entry
        boxed = bool(there.task.symbol) or there.origin.shape == "page" or len(found) == 1
        changed.append(_edit(library, mark.item, mark.edits, args.write_back and boxed))
    lines = [printing.line([m]) for m in changed] or [f"{item.entry.title} was {args.state} already"]
    return Result("\n".join(lines), [printing.data(m) for m in changed])


def todo(library: Library, args: argparse.Namespace) -> Result:
    args.state = args.state or "todo"
    groups = [
        g for g in _groups(_chosen(library, args)) if not any(i.entry.state == "done" for i in library.work(g[0].work))
    ]

    def urgency(group: list[Item]) -> tuple:
        best = max(suggest.PRIORITY[i.entry.task.priority] for i in group)
        dues = [d for i in group for d in (i.entry.task.dates.due, i.entry.task.dates.scheduled) if d]
        return (min(dues, default="9999"), -best, group[0].id)

    groups.sort(key=urgency)
    data = [printing.data(item) for group in groups for item in group]
    return Result("\n".join([*map(printing.line, groups), f"{len(groups)} to read"]), data)


def questions(library: Library, args: argparse.Namespace) -> Result:
    lines, data, seen = [], [], set()
    for item in library.items():
        origin = item.entry.origin
        found = [q for q in questions_of(item.entry.text) if args.answered or not q.answered]
        found = [q for q in found if (origin.path, q.text) not in seen]
        seen |= {(origin.path, q.text) for q in found}
        if found:
            lines += [f"{item.id:>5} {item.entry.title}", *(f"        {q.text}" for q in found)]
            data += [
                {"id": item.id, "title": item.entry.title, "question": q.text, "answered": q.answered} for q in found
            ]
    return Result("\n".join(lines) or "no open questions", data)


def tag(library: Library, args: argparse.Namespace) -> Result:
    item = find(library, [args.entry])
    added = [t.lstrip("#") for t in args.tags if not t.startswith("-")]
    removed = [t.lstrip("-#") for t in args.tags if t.startswith("-")]
    for name in (*added, *removed):
        if not name or any(c.isspace() or c in '!@#$%^&*(),.?":{}|<>' for c in name):
            raise UserError(f"{name!r} is no tag: use letters, digits, / _ and -")
    for name in removed:
        if name not in item.entry.tags:
            raise UserError(f"entry {item.id} has no tag {name!r}{nearest(name, item.entry.tags)}")
    edits = {key: tags for key, tags in (("tags+", added), ("tags-", removed)) if tags}
    item = _edit(library, item, edits, args.write_back)
    return Result(f"{item.id} {item.entry.title}: {' '.join(item.entry.tags)}", printing.data(item))


def edit(library: Library, args: argparse.Namespace) -> Result:
    item = find(library, [args.entry])
    edits: dict[str, Any] = {k: v for k in ("title", "name", "year", "priority") if (v := getattr(args, k)) is not None}
    dates = {k: v for k in ("due", "scheduled") if (v := getattr(args, k)) is not None}
    edits |= {"dates": dates} if dates else {}
    edits |= {"notes": args.note} if args.note else {}
    if args.text is not None:
        edits["text"] = sys.stdin.read().rstrip("\n") if args.text == "-" else args.text
    if "title" in edits and not edits["title"].strip():
        raise UserError("a title cannot be empty: give it words")
    if args.write_back and (fixed := [k for k in ("title", "name", "year") if k in edits]):
        raise UserError(f"the {fixed[0]} is not written back: change it in the file, or leave out --write-back")
    if edits:
        item = _edit(library, item, edits, args.write_back)
    return Result(printing.full(item, [], None, []), printing.data(item))


def next_(library: Library, args: argparse.Namespace) -> Result:
    papers, items = catalogue(), library.items()
    found = suggest.next_to_read(items, certain(library, papers, items), papers, date.today(), args.limit)
    first = {item.work: item.id for item in reversed(items)}
    lines = []
    for s in found:
        lines.append(f"{first.get(s.work, '+'):>5} {s.title}" + (f"  = {s.key}" if s.key else ""))
        lines += [f"        {reason}" for reason in s.reasons]
    if any(not s.work for s in found):
        lines.append("+ is not in your library: dx notes add KEY takes it in")
    return Result("\n".join(lines) or "nothing to read: dx notes add or import something", [vars(s) for s in found])


def add(library: Library, args: argparse.Namespace) -> Result:
    words = " ".join(args.what).strip()
    identifier = identifiers.parse(words)
    papers = catalogue()
    record = papers.records.get(words)
    scheme = words.partition(":")[0].lower()
    if identifier is None and scheme in identifiers.EXAMPLES:
        raise UserError(f"{words!r} is no {scheme} id: write it as {identifiers.EXAMPLES[scheme]}")
    if record and record.arxiv:
        identifier = identifiers.arxiv(record.arxiv)
    if identifier and (there := library.by_identifier(identifier)):
        raise UserError(
            f"{identifier} is in the library as entry {there[0].id}: dx notes edit {there[0].id} --note '...'"
        )
    if identifier and not record and identifier.scheme == "arxiv":
        record = papers.records.get(papers.by_arxiv.get(identifier.value, ""))
    url = identifiers.url_of(identifier) if identifier else words if words.startswith(("http://", "https://")) else ""
    title = record.title if record else str(identifier) if identifier else words
    links = (Link(url),) if url else ()
    reference = Reference(
        title, year=record.year if record else None, ids=(identifier,) if identifier else (), links=links
    )
    if args.fetch:
        if identifier is None or identifier.scheme != "arxiv":
            raise UserError("--fetch asks arXiv: give an arXiv id, as arxiv:2503.10622")
        known = arxiv.fetch(library, [identifier.value])
        if identifier.value not in known:
            raise UserError(f"arXiv has no paper {identifier.value}: check the id")
        reference = _described(reference, known[identifier.value])
    elif identifier and (known := arxiv.cached(library, [identifier.value])):
        reference = _described(reference, known[identifier.value])
    today = date.today().isoformat()
    task = tasks.with_state(Task(priority=args.priority), "done" if args.read else "todo", today)
    task = replace(task, dates=replace(task.dates, created=today))
    tags = tuple(dict.fromkeys(t.lstrip("#") for t in args.tag))
    number = library.add(Entry(reference, task, tags, args.note, Origin(shape="added")))
    item = library.item(number)
    return Result(printing.line([item]), printing.data(item))


def prune(library: Library, args: argparse.Namespace) -> Result:
    gone = library.gone()
    verb = "would be removed" if args.dry_run else "removed"
    lines = [f"{i.id:>5} {i.entry.title}" + ("  (edited here)" if i.edits else "") for i in gone]
    if not args.dry_run:
        library.remove([item.id for item in gone])
    lines.append(f"{len(gone)} entries {verb}: their lines or files are gone" if gone else "nothing is gone")
    return Result("\n".join(lines), [printing.data(item) for item in gone])


def remove(library: Library, args: argparse.Namespace) -> Result:
    words = " ".join(args.what)
    path = str(Path(words).expanduser().absolute())
    inside = [p for p in library.sources() if p in (words, path) or p.startswith(path.rstrip("/") + "/")]
    if inside:
        items = [i for i in library.items() if i.entry.origin.path in inside]
        library.forget(inside)
        text = f"{len(items)} entries of {len(inside)} files removed from the library; the files stay as they are"
        return Result(text, [printing.data(item) for item in items])
    item = find(library, args.what)
    origin = item.entry.origin
    if origin.path and not item.gone and Path(origin.path).exists():
        name = Path(origin.path).name
        raise UserError(
            f"entry {item.id} stands in {name}:{origin.line}: delete it there and import {name} again, or "
            f"remove the file"
        )
    library.remove([item.id])
    return Result(f"removed {item.id} {item.entry.title}", [printing.data(item)])


def fetch(library: Library, args: argparse.Namespace) -> Result:
    items = [i for i in library.items() if [x for x in i.entry.reference.ids if x.scheme == "arxiv"]]
    wanted = list(dict.fromkeys(x.value for i in items for x in i.entry.reference.ids if x.scheme == "arxiv"))
    known = arxiv.cached(library, wanted)
    missing = [identifier for identifier in wanted if identifier not in known]
    known |= arxiv.fetch(library, missing[: args.limit or None])
    changed = 0
    for item in items:
        identity = [key.removeprefix("arxiv:") for key in item.entry.reference.identity if key.startswith("arxiv:")]
        found = known.get(identity[0]) if identity else None
        new = _described(item.entry.reference, found) if found else item.entry.reference
        fields = {k: getattr(new, k) for k in ("title", "authors", "year", "venue")}
        edits = {
            k: list(v) if k == "authors" else v for k, v in fields.items() if v != getattr(item.entry.reference, k)
        }
        if edits:
            library.edit(item.id, edits)
            changed += 1
    text = f"arXiv knows {len(known)} of {len(wanted)} papers; {changed} entries have more to say now"
    return Result(text, {"known": len(known), "asked": len(wanted), "changed": changed})


def join_(library: Library, args: argparse.Namespace) -> Result:
    papers = catalogue()
    for pair, yes in ((args.accept, True), (args.reject, False)):
        if pair:
            if pair[1] not in papers.records:
                raise UserError(
                    f"there is no paper {pair[1]!r}{nearest(pair[1], papers.records)} ('dx list' shows all)"
                )
            decide(library, find(library, [pair[0]]), pair[1], yes)
    items = library.items()
    joined = join(library, papers, items)
    first = {item.work: item for item in reversed(items)}
    open_ = [j for j in joined.values() if j.how == "likely"]
    lines = []
    for j in open_:
        lines.append(f"{first[j.work].id:>5} {first[j.work].entry.title}")
        lines.append(f"        {j.score:g}  {j.key}: {papers.records[j.key].title}")
    if open_:
        lines.append("dx notes join --accept ENTRY KEY, or --reject ENTRY KEY")
    lines.append(f"{len(joined) - len(open_)} works are joined to a paper of Δx")
    return Result("\n".join(lines), [vars(j) for j in joined.values()])


def export(library: Library, args: argparse.Namespace) -> Result:
    form = args.format
    if form is None:
        by_suffix = {".bib": "bibtex", ".json": "csl", ".ris": "ris", ".md": "obsidian"}
        form = by_suffix.get(Path(args.target or "").suffix.lower())
        if form is None:
            raise UserError(f"which format? --format {' or '.join(formats.NATIVE)}")
    entries = [item.entry for item in _chosen(library, args)]
    if form == "obsidian":
        entries.sort(key=lambda entry: bool(entry.origin.section))  # what is in no section stands before the first one
    text = formats.write(entries, form)
    if args.target is None:
        return Result(text.rstrip("\n"))
    path = Path(args.target)
    if str(path.resolve()) in library.sources():
        raise UserError(f"{args.target} is one of your note files: export to another file")
    try:
        with path.open("w" if args.overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{args.target} exists: add --overwrite, or choose another name") from None
    except OSError as error:
        raise UserError(f"{args.target} cannot be written ({error.strerror}): choose another place") from None
    return Result(f"wrote {args.target}")


def find(library: Library, words: list[str]) -> Item:
    """The entry that `words` name: a number, an identifier, or words of a title that fit one work."""
    text = " ".join(words).strip()
    if text.isdigit():
        return library.item(int(text))
    if identifier := identifiers.parse(text):
        if found := library.by_identifier(identifier):
            return found[0]
        raise UserError(f"no entry has {identifier}: dx notes add {identifier}")
    hits = library.search(text, 50)
    whole = [
        i
        for i in hits
        if identifiers.normal_title(text) in map(identifiers.normal_title, (i.entry.title, i.entry.reference.name))
    ]
    folded = identifiers.normal_title(text)
    titled = whole or [item for item in hits if folded in identifiers.normal_title(item.entry.title)]
    if len({item.work for item in titled}) == 1:
        return titled[0]
    if titled:
        raise UserError(f"{text!r} fits {', '.join(f'{i.id} ({i.entry.title})' for i in titled[:5])}: give a number")
    raise UserError(f"no entry is called {text!r}: dx notes search {text}")


def _edit(library: Library, item: Item, edits: dict[str, Any], write_back: bool) -> Item:
    """Edit in the library, and in the file when asked; then the file says it and the library forgets its edit."""
    after = library.edit(item.id, edits)
    if not write_back:
        return after
    written = writeback.write(library.in_file(item.id), after)
    import_paths(library, [item.entry.origin.path])
    library.settle(item.id, written)
    return library.item(item.id)


def _described(reference: Reference, found: arxiv.Metadata) -> Reference:
    """What arXiv says, where the note has nothing of its own: a title is replaced only when it is an address."""
    bare = reference.title.startswith(("http://", "https://", "arxiv:"))
    return replace(
        reference,
        title=found.title if bare else reference.title,
        authors=reference.authors or found.authors,
        year=reference.year or found.year,
        venue=reference.venue or found.journal,
    )


def _chosen(library: Library, args: argparse.Namespace) -> list[Item]:
    state = "" if args.state == "noted" else args.state
    items = library.items("e.state=?", (state,)) if args.state else library.items()
    if args.tag:
        wanted = args.tag.lstrip("#").casefold()
        items = [
            i
            for i in items
            if any(t.casefold() == wanted or t.casefold().startswith(wanted + "/") for t in i.entry.tags)
        ]
    return [i for i in items if args.file in i.entry.origin.path] if args.file else items


def _groups(items: list[Item]) -> list[list[Item]]:
    out: dict[int, list[Item]] = {}
    for item in items:
        out.setdefault(item.work, []).append(item)
    return list(out.values())


def _sum(items: list[Item]) -> str:
    works = len({item.work for item in items})
    return f"{works} works, {len(items)} entries" if items else "no entries: dx notes import PATH"


def _family(joined: Joined | None, papers: Catalogue) -> list[str]:
    if joined is None or joined.how == "likely":
        return []
    parents = [key for key in papers.records[joined.key].on if key in papers.records]
    children = [key for key, record in papers.records.items() if joined.key in record.on]
    return [f"{word} {', '.join(keys)}" for word, keys in (("X:", parents), ("built on by", children)) if keys]
