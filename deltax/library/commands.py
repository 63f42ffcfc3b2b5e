"""`dx notes`: reading notes at the shell."""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

from deltax.errors import UserError
from deltax.library import actions, printing
from deltax.library.formats import NATIVE
from deltax.library.model import PRIORITIES, STATES

_HELP = """\
Your paper notes as a library: import them, search them, join them to the genealogy.

  dx notes import ~/vault papers.md refs.bib    take in a vault, a file, a bibliography (never written to)
  dx notes search "low rank"                    best matches first
  dx notes next                                 what to read next, and why
  dx notes read 12 --write-back                 tick it here and in your file

An entry is one note on one thing. Entries that speak of one paper (same arXiv, OpenReview or DOI id, or same title) are
one work, and `list` shows a line for each work. ENTRY below is an entry's number, an identifier (arxiv:2503.10622,
doi:..., a URL), or words of its title. Your edits live in the library and survive every import.
"""


def add_to(subparsers: argparse._SubParsersAction) -> None:
    """Register `dx notes`. The parsed arguments carry `run`, a function of them that returns the exit code."""
    parser = subparsers.add_parser(
        "notes", help="your reading notes", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, help: str, action, *, shows: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if shows:
            sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=lambda args: _run(action, args))
        return sub

    sub = command("import", "take in Markdown files, folders, Obsidian vaults, .bib .ris .json .csv", actions.import_)
    sub.add_argument("paths", nargs="+", metavar="PATH")
    sub.add_argument("--dry-run", action="store_true", help="show what would come in, change nothing")
    sub.add_argument("--all", action="store_true", help="list every line that is in no entry")

    sub = command("list", "list works, or every entry", actions.list_)
    _filters(sub)
    sub.add_argument("--entries", action="store_true", help="a line for each entry, not for each work")
    sub.add_argument("--remarks", action="store_true", help="what imports did not understand, by file and line")

    sub = command("show", "show an entry with its notes, questions, dates and place in the genealogy", actions.show)
    sub.add_argument("entry", nargs="+", metavar="ENTRY")

    sub = command("search", "search titles, names, notes and tags, best first", actions.search)
    sub.add_argument("query", nargs="+", metavar="WORD")
    sub.add_argument("--limit", type=_count, default=20, help="at most this many (20)")

    sub = command("read", "mark an entry's work as read", actions.read)
    sub.add_argument("entry", nargs="+", metavar="ENTRY")
    sub.add_argument("--state", choices=STATES[1:], default="done", help="another read state (done)")
    sub.add_argument("--on", metavar="YYYY-MM-DD", default="", help="the day (today)")
    _write_back(sub)

    sub = command("todo", "what is to be read, by priority and date", actions.todo)
    _filters(sub)

    sub = command("questions", "questions that your notes leave open", actions.questions)
    sub.add_argument("--answered", action="store_true", help="those that the same line answers too")

    sub = command("tag", "add and remove tags: dx notes tag 12 attention -- -old", actions.tag)
    sub.add_argument("entry", metavar="ENTRY")
    sub.add_argument("tags", nargs="+", metavar="TAG", help="a tag to add, or -TAG after -- to remove")
    _write_back(sub)

    sub = command("edit", "change what an entry says; without options, print it", actions.edit)
    sub.add_argument("entry", metavar="ENTRY")
    sub.add_argument("--title")
    sub.add_argument("--name", help="short name, as of the model")
    sub.add_argument("--year", type=int)
    sub.add_argument("--priority", choices=PRIORITIES)
    sub.add_argument("--due", metavar="YYYY-MM-DD", help="'' removes it")
    sub.add_argument("--scheduled", metavar="YYYY-MM-DD", help="'' removes it")
    sub.add_argument("--note", action="append", help="a line to add below the text; may be given again")
    sub.add_argument("--text", help="the whole text anew; - reads it from standard input")
    _write_back(sub)

    sub = command("next", "propose what to read next, from priorities, dates and the genealogy", actions.next_)
    sub.add_argument("--limit", type=_count, default=10, help="at most this many (10)")

    sub = command("add", "add a paper by identifier or title: dx notes add arxiv:2503.10622 --note '...'", actions.add)
    sub.add_argument("what", nargs="+", metavar="WHAT")
    sub.add_argument("--note", default="", help="what you have to say about it")
    sub.add_argument("--tag", action="append", default=[], help="may be given again")
    sub.add_argument("--priority", choices=PRIORITIES, default="normal")
    sub.add_argument("--read", action="store_true", help="you have read it")
    sub.add_argument("--fetch", action="store_true", help="ask arXiv for its title, authors and year")

    sub = command("prune", "remove entries whose lines or files are gone", actions.prune)
    sub.add_argument("--dry-run", action="store_true", help="show what would be removed, change nothing")

    sub = command("remove", "remove an entry that is in no file, or a file's entries, from the library", actions.remove)
    sub.add_argument("what", nargs="+", metavar="ENTRY|PATH")

    sub = command("fetch", "ask arXiv for titles, authors and years of works that have its id (network)", actions.fetch)
    sub.add_argument("--limit", type=_count, help="ask for at most this many papers that are not known yet (all)")

    sub = command("join", "pairs of a work and a paper of the catalogue that need your word", actions.join_)
    sub.add_argument("--accept", nargs=2, metavar=("ENTRY", "KEY"), help="they are the same")
    sub.add_argument("--reject", nargs=2, metavar=("ENTRY", "KEY"), help="they are not")

    sub = command("export", "write entries as " + ", ".join(NATIVE), actions.export, shows=False)
    sub.add_argument("target", nargs="?", metavar="FILE", help="where to (standard output)")
    sub.add_argument("--format", choices=tuple(NATIVE), help="by FILE's suffix where that is clear")
    sub.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    _filters(sub)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
    return int(text)


def _filters(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--state", choices=(*STATES[1:], "noted"), help="noted: written about, without a checkbox")
    sub.add_argument("--tag", help="with this tag (a section's heading is a tag)")
    sub.add_argument("--file", help="from files whose path contains this")


def _write_back(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--write-back", action="store_true", help="also in your file, where all else stays byte for byte")


def _run(action, args: argparse.Namespace) -> int:
    from deltax.library.store import Library

    for name in ("on", "due", "scheduled"):
        if given := getattr(args, name, None):
            try:
                date.fromisoformat(given)
            except ValueError:
                raise UserError(f"{given!r} is no day: write it as {date.today().isoformat()}") from None
    with Library() as library:
        result = action(library, args)
    if getattr(args, "json", False):
        json.dump(result.data, sys.stdout, ensure_ascii=False, indent=2)
        print()
    elif result.text:
        print(printing.safe(result.text))
    return result.code


def main(arguments: list[str] | None = None) -> int:
    """`python -m deltax.library`: the same commands without the rest of dx."""
    parser = argparse.ArgumentParser(prog=f"python -m {Path(__file__).parent.parent.name}.library")
    add_to(parser.add_subparsers(metavar="COMMAND", required=True))
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"dx: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
