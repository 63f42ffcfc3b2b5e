"""`dx serve` and `dx site build`."""

import argparse
import time
from pathlib import Path
from typing import Any

PORT = 8753


def add_to(subparsers: Any) -> None:
    """Register both commands. The parsed arguments carry `run`, a function of them."""
    it = subparsers.add_parser(
        "serve",
        help="show the genealogy, comparisons and notes in a browser",
        description="Show the genealogy, comparisons and notes in a browser. Only this machine can reach the pages.",
    )
    it.add_argument("--port", type=int, default=PORT, help=f"where to listen (default {PORT}; 0 takes a free one)")
    it.add_argument("--open", action="store_true", help="open the front page in a browser")
    it.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    it.add_argument(
        "--expose",
        action="store_true",
        help="allow a --host that other machines reach: they can then read and edit the notes",
    )
    it.add_argument("--store", metavar="DIR", help="where runs are kept (default $DELTAX_HOME/runs)")
    it.set_defaults(run=_serve)

    it = subparsers.add_parser("site", help="write the pages as files", description="The pages as files.")
    commands = it.add_subparsers(title="commands", metavar="COMMAND", required=True)
    it = commands.add_parser(
        "build",
        help="write every page into a folder",
        description="Write every page into a folder that works from file:// and on any web server. Of the notes, only "
        "those of files with 'dg-publish: true' in their front matter are in it.",
    )
    it.add_argument("folder", metavar="DIR", type=Path)
    it.add_argument("--store", metavar="DIR", help="where runs are kept (default $DELTAX_HOME/runs)")
    it.set_defaults(run=_build)


def _serve(arguments: argparse.Namespace) -> None:
    from deltax.site import server

    server.serve(
        _site(arguments),
        host=arguments.host,
        port=arguments.port,
        reach="everyone" if arguments.expose else "loopback",
        visit="browser" if arguments.open else "none",
    )


def _build(arguments: argparse.Namespace) -> None:
    from deltax.site.build import build

    began = time.perf_counter()
    counts = build(arguments.folder, _site(arguments))
    said = ", ".join(f"{n} {kind if n != 1 else kind.removesuffix('s')}" for kind, n in counts.items())
    print(f"{arguments.folder}: {said} in {time.perf_counter() - began:.1f} s. Open {arguments.folder / 'index.html'}")


def _site(arguments: argparse.Namespace) -> Any:
    from deltax.site.pages import Site
    from deltax.site.runs import Runs

    return Site(runs=Runs(Path(arguments.store).expanduser())) if arguments.store else Site()
