"""`dx`, also installed as `deltax`. Commands on the catalogue load no torch; the others import it when they run."""

import argparse
import math
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from deltax import __version__, catalog
from deltax.errors import DataWarning, UserError, nearest
from deltax.lab.printing import print_json

_RECIPE = "a recipe: papers joined by +, the first one a whole recipe, as in 'gpt+rope+dyt(alpha=0.8)'"
_EXAMPLES = """\
examples:
  dx list norm                       papers about norms
  dx show dyt                        the sentence, the change, the claims and their verdicts
  dx diff gpt gpt+dyt --source       what exactly changed
  dx compare gpt gpt+dyt gpt+alibi   a fair experiment
  dx verify dyt                      does it hold here?
  dx notes import reading-list.md    your reading notes, joined to the papers
  dx serve                           all of it in a browser
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a claim that failed, 2 for a mistake that can be mended."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        arguments = parser(next(iter(words), "")).parse_args(words)
        with _plain_warnings():
            return arguments.run(arguments) or 0
    except UserError as error:
        for sentence in (error, *getattr(error, "__notes__", ())):
            print(f"dx: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndx: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A `DataWarning` is shown as a mistake is: the sentence, without the place in our code that gave it."""
    usual = warnings.formatwarning

    def shown(message: Any, category: type[Warning], *where: Any) -> str:
        return f"dx: {message}\n" if issubclass(category, DataWarning) else usual(message, category, *where)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = usual


def parser(first: str = "") -> argparse.ArgumentParser:
    """The command line; that of notes and pages in full only where `first`, the first word, asks for them."""
    dx = _Parser(
        prog="dx",
        description="X, but with Y: papers as rewrites that add up, with their claims as code.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dx.add_argument("--version", action="version", version=f"deltax {__version__}")
    commands = dx.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_catalogue(commands)
    _add_training(commands)
    _add_lab(commands)
    _add_pages(commands, first)
    return dx


class _Parser(argparse.ArgumentParser):
    """An unknown command or option is an error with the nearest known one; options are not abbreviated.

    With abbreviations `--lr 0.001` would be read as `--lr-scale 0.001`.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, action.choices)
            if action.metavar == "COMMAND":
                raise UserError(f"there is no command {value!r}{hint or f': {self.prog} --help lists them'}")
            raise argparse.ArgumentError(action, f"it is {' or '.join(action.choices)}, not {value!r}{hint}")

    def parse_known_args(self, *given: Any) -> Any:
        found, unknown = super().parse_known_args(*given)
        if unknown:
            hint = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(
                f"there is no {unknown[0]}{hint}" if unknown[0].startswith("-") else f"{unknown[0]!r} is one too many"
            )
        return found, unknown


def _add_catalogue(commands: Any) -> None:
    it = _command(commands, "list", _list, "list papers, oldest first")
    it.add_argument("words", nargs="*", help="show only papers with all of these words in key, title or sentence")
    it.add_argument("--field", help="only this field, as in 'language' or 'vision'")
    _json_option(it)

    it = _command(commands, "show", _show, "show a paper, or the tree of a recipe")
    it.add_argument("what", metavar="KEY", help="a paper's key, or a recipe such as 'gpt+dyt'")
    it.add_argument("--source", action="store_true", help="print the source of the Y as well")
    _json_option(it)

    it = _command(commands, "diff", _diff, "compare two recipes line by line")
    it.add_argument("a", metavar="A", help=_RECIPE)
    it.add_argument("b", metavar="B")
    it.add_argument("--source", action="store_true", help="print the code of every Y that B has and A has not")
    _json_option(it)

    it = _command(commands, "apply", _apply, "list the papers that rewrite a model of your own, as in dyt.apply(model)")
    it.add_argument("--list", action="store_true", help="each of them, with the parts that it looks for (the default)")
    _json_option(it)


def _add_training(commands: Any) -> None:
    it = _command(commands, "train", _train, "train one recipe, on every core or the GPU, and keep its weights")
    it.add_argument("recipe", metavar="RECIPE", help=_RECIPE)
    it.add_argument("--steps", type=_positive, help="optimizer steps (default: the recipe's own)")
    it.add_argument("--seed", type=int, default=0, help="seed of the start and the data order (default 0)")
    it.add_argument(
        "--lr-scale", type=_factor, default=1.0, metavar="FACTOR", help="multiple of the recipe's learning rate"
    )
    it.add_argument("--compile", action="store_true", help="train through torch.compile")
    it.add_argument(
        "--mesh",
        metavar="AXES",
        help="processes that share the run: dp (replicas), fsdp (shards), tp (tensors), pp (stages), as in dp=2,tp=2",
    )
    it.add_argument(
        "--patience", type=float, default=600, metavar="SECONDS", help="how long they wait for each other (default 600)"
    )
    it.add_argument("--report", metavar="FILE", help="an .html page of the run: what it makes of held-out pictures")
    it.add_argument("--log", action="append", default=[], metavar="TRACKER", help="tensorboard, wandb, trackio, mlflow")
    _data_options(it)
    _store_option(it)
    _json_option(it)

    it = _command(commands, "sample", _sample, "let a trained language model go on from a prompt")
    it.add_argument("of", metavar="RUN", help="a run's id as 'dx runs' shows it, or the first letters of it")
    it.add_argument("prompt", help="the text to go on from")
    it.add_argument("--length", type=_positive, default=200, help="bytes to write (default 200)")
    it.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest (default 0.8)")
    it.add_argument("--seed", type=int, default=0)
    _store_option(it)
    _json_option(it)

    it = _command(commands, "runs", _runs, "list the runs in the store")
    it.add_argument("words", nargs="*", help="show only runs whose recipe has all of these words")
    _store_option(it)
    _json_option(it)


def _add_lab(commands: Any) -> None:
    it = _command(commands, "compare", _compare, "a fair experiment: every recipe against the first")
    it.add_argument("recipes", nargs="+", metavar="RECIPE", help=_RECIPE)
    it.add_argument(
        "--budget",
        default="quick",
        help="smoke, quick (default), solid, claim; or what one run may use: 60s, 2e12flops, 300k tokens",
    )
    it.add_argument("--pairs", type=_positive, help="paired runs a recipe (default: the budget's)")
    it.add_argument(
        "--until-clear", action="store_true", help="look after 4, 8 and 12 pairs, and stop when it is clear"
    )
    it.add_argument(
        "--ladder", choices=["on", "off"], default="on", help="measure compute-equivalent gain (default on)"
    )
    it.add_argument(
        "--report", metavar="FILE", default="report.html", help="where the report goes (default report.html)"
    )
    it.add_argument("--plan", action="store_true", help="print the plan and its duration, and stop")
    _data_options(it)
    _engine_options(it)

    it = _command(commands, "interact", _interact, "is A+B more or less than A times B?")
    it.add_argument("changes", nargs=2, metavar="DELTA", help="two deltas, as in 'dx interact rope swiglu'")
    it.add_argument("--on", default="gpt", metavar="RECIPE", help="the recipe they are added to (default gpt)")
    it.add_argument("--budget", default="quick", help="as for compare")
    it.add_argument("--pairs", type=_positive)
    _data_options(it)
    _engine_options(it)

    it = _command(commands, "verify", _verify, "run a paper's claims and store the verdicts under evidence/")
    it.add_argument("keys", nargs="+", metavar="KEY", help="papers' keys")
    it.add_argument("--claim", metavar="NAME", help="only this claim")
    it.add_argument(
        "--rehearse",
        action="store_true",
        help="only the measured claims, with two training steps each: do they run? Nothing is stored",
    )
    _engine_options(it)

    it = _command(commands, "report", _report, "write a comparison's report again")
    it.add_argument("which", nargs="?", metavar="ID", help="a comparison's id (default: the newest)")
    it.add_argument("--to", metavar="FILE", default="report.html", help="an .html or .md file (default report.html)")
    _store_option(it)
    _json_option(it)


def _add_pages(commands: Any, first: str) -> None:
    if first == "notes":
        from deltax.library.commands import add_to
    elif first in ("serve", "site"):
        from deltax.site.commands import add_to
    else:
        commands.add_parser("notes", help="your reading notes: import, search, what to read next, export")
        commands.add_parser("serve", help="the genealogy, comparisons and notes in a browser")
        commands.add_parser("site", help="the same pages as files")
        return
    add_to(commands)


def _command(commands: Any, name: str, run: Any, says: str) -> argparse.ArgumentParser:
    end = "" if says.endswith("?") else "."
    it: argparse.ArgumentParser = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}{end}")
    it.set_defaults(run=run)
    return it


def _json_option(it: argparse.ArgumentParser) -> None:
    it.add_argument("--json", action="store_true", help="print JSON")


def _store_option(it: argparse.ArgumentParser) -> None:
    it.add_argument("--store", metavar="DIR", help="where runs are kept (default $DELTAX_HOME/runs)")


def _data_options(it: argparse.ArgumentParser) -> None:
    it.add_argument("--set", dest="settings", action="append", default=[], metavar="PATH=VALUE", help="set one leaf")
    it.add_argument(
        "--data",
        metavar="SOURCE",
        help="text: a file or folder (.txt .md .py .jsonl .parquet .gz) or hf:NAME from the hub; "
        "pictures: a folder with one folder of PNG or JPEG files for each class; with boxes or masks, COCO's JSON or "
        "its folder; with captions, a .jsonl or .csv of files and captions. A faulty file stops what is trained on "
        "pictures, and --set task.faults=skip goes on without it",
    )


def _engine_options(it: argparse.ArgumentParser) -> None:
    it.add_argument("--engine", choices=["local", "ray"], default="local", help="where runs go (default local)")
    it.add_argument("--workers", type=_positive, help="runs at a time (default: one a core)")
    it.add_argument("--log", action="append", default=[], metavar="TRACKER", help="tensorboard, wandb, trackio, mlflow")
    _store_option(it)
    _json_option(it)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text!r}")
    return int(text)


def _factor(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0, not {text!r}")


def _list(arguments: argparse.Namespace) -> None:
    records = list(catalog.papers().values())
    fields = {r.field for r in records}
    if arguments.field and arguments.field not in fields:
        hint = nearest(arguments.field, fields) or f"; there are {', '.join(sorted(fields))}"
        raise UserError(f"there is no field {arguments.field!r}{hint}")
    wanted = [word.lower() for word in arguments.words]
    records = [
        r
        for r in records
        if arguments.field in (None, r.field)
        and all(word in f"{r.key} {r.title} {r.sentence}".lower() for word in wanted)
    ]
    if arguments.json:
        print_json([_summary(r) for r in records])
        return
    width = max([len(r.key) for r in records], default=0)
    for r in records:
        print(f"{r.year}  {r.key:{width}}  {r.field:12}  {r.sentence}")
    if not records:
        print("no paper has all of these words; 'dx list' shows all")


def _apply(arguments: argparse.Namespace) -> None:
    from importlib import import_module

    from deltax.parts.rewriting.surgery import looked_for

    served, refused = {}, {}
    for key, record in catalog.papers().items():
        if record.kind == "delta":
            try:
                served[key] = looked_for(getattr(import_module(record.module), record.function))
            except UserError as reason:
                refused[key] = str(reason)
    if arguments.json:
        print_json({"applied": served, "refused": refused})
        return
    for key, slots in served.items():
        record = catalog.find(key)
        print(f"{key}: from {record.module} import {record.function}; {record.function}.apply(model)")
        for slot, parts in slots.items():
            print(f"  {slot:8} {parts}")
    print(f"{len(refused)} other changes are for recipes; 'dx apply --json' gives the reason for each")


def _summary(record: catalog.Record) -> dict[str, Any]:
    return {
        "key": record.key,
        "title": record.title,
        "authors": record.authors,
        "year": record.year,
        "field": record.field,
        "family": record.family,
        "kind": record.kind,
        "sentence": record.sentence,
        "link": record.link,
        "on": list(record.on),
        "evidence": catalog.counts(record),
    }


def _show(arguments: argparse.Namespace) -> None:
    if any(mark in arguments.what for mark in "+("):
        _show_recipe(arguments)
        return
    record = catalog.find(arguments.what)
    stored = catalog.evidence(record.key)
    if arguments.json:
        claims = [vars(c) for c in record.claims]
        print_json({**_summary(record), "prose": record.prose, "claims": claims, "stored": stored})
        return
    children = catalog.children(record.key)
    print(f"{record.title}\n{record.authors}, {record.year}. {record.link}\n\n{record.sentence}\n")
    if record.prose:
        print(f"{record.prose}\n")
    print(f"builds on   {', '.join(record.on) or '(none here)'}")
    print(f"built on by {', '.join(children) or '(none here)'}")
    print(f"use         {catalog.use(record, catalog.papers())}\n\nclaims")
    for c in record.claims:
        print(f"  {c.kind:8}  {c.says}")
        if c.peer:
            print(f"            against {c.peer}")
        if c.kind == "measured":
            found = stored.get("measured", {}).get(c.name)
            print(
                f"            paper: {c.paper}\n            here:  {found['summary'] if found else 'not measured yet'}"
            )
            print(f"            again: dx verify {record.key} --claim {c.name}")
    for name, found in stored.get("speed", {}).items():
        print(f"  speed     {name}: {found['summary']}")
    if arguments.source:
        print(f"\n{record.change()}")


def _show_recipe(arguments: argparse.Namespace) -> None:
    from deltax import kernels
    from deltax.expression import recipe
    from deltax.recipe import Part, to_json
    from deltax.train.machine import Machine

    tree = recipe(arguments.what)
    if arguments.json:
        print_json({"id": tree.id, "title": tree.title, "tree": to_json(tree)})
        return
    print(f"{tree.title}  ({tree.id})\n")
    for path, value in tree.walk():
        if value is not None:
            shown = value.target.__name__ if isinstance(value, Part) else repr(value)
            indent = "  " * path.count(".")
            _print_wrapped(f"{indent}{path.rpartition('.')[2]} = {shown}", indent + "    ")
    for line in kernels.said(tree, Machine.here().device):
        print(f"\n{line}")
    if arguments.source:
        _print_source(catalog.find(applied.paper.key) for applied in tree.history)


def _print_wrapped(line: str, indent: str) -> None:
    """Broken at blanks to the width of the terminal, where the output is one."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line) + 1
    print(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _diff(arguments: argparse.Namespace) -> None:
    from deltax.expression import recipe
    from deltax.recipe import diff

    a, b = recipe(arguments.a), recipe(arguments.b)
    lines = diff(a, b)
    added = [c.paper.key for c in b.history if c.paper.key not in {c.paper.key for c in a.history}]
    if arguments.json:
        changes = [dict(zip(("path", "a", "b"), line)) for line in lines]
        source = {key: catalog.find(key).change() for key in added} if arguments.source else {}
        print_json({"a": a.title, "b": b.title, "diff": changes, "source": source})
        return
    width = max([len(path) for path, _, _ in lines], default=0)
    for path, old, new in lines:
        _print_wrapped(f"{path:{width}}  {old} -> {new}", "    ")
    if not lines:
        print(f"{a.title} and {b.title} are the same recipe")
    if arguments.source:
        _print_source(map(catalog.find, added))


def _print_source(records: Iterable[catalog.Record]) -> None:
    for record in records:
        print(f"\n# {record.key}: {record.sentence}\n{record.change()}")


def _recipe(expression: str, arguments: argparse.Namespace) -> Any:
    from deltax.expression import recipe

    tree = recipe(expression, arguments.settings)
    tree["loop"]()  # refuses counts below one
    return tree if arguments.data is None else tree.put("task.source", arguments.data)


def _train(arguments: argparse.Namespace) -> None:
    from deltax.lab import shell

    shell.train(_recipe(arguments.recipe, arguments), arguments)


def _sample(arguments: argparse.Namespace) -> None:
    from deltax.lab import shell

    shell.sample(arguments)


def _runs(arguments: argparse.Namespace) -> None:
    from deltax.lab import shell

    shell.runs(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from deltax.lab import warm

    if arguments.engine == "local" and not arguments.plan:
        warm.up()
    from deltax.lab import shell

    shell.compare([_recipe(r, arguments) for r in arguments.recipes], arguments)


def _interact(arguments: argparse.Namespace) -> None:
    from deltax.expression import delta
    from deltax.lab import shell

    shell.interact(_recipe(arguments.on, arguments), *map(delta, arguments.changes), arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from deltax.lab import shell

    run = shell.rehearse if arguments.rehearse else shell.verify
    return run([catalog.find(key) for key in arguments.keys], arguments)


def _report(arguments: argparse.Namespace) -> None:
    from deltax.lab import shell

    shell.report(arguments)


if __name__ == "__main__":
    sys.exit(main())
