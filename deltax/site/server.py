"""The pages over HTTP, on this machine, with what changes a note and what tells of running trainings.

A page can be changed only by a page of this server: a write must name this host, come from this origin and carry the
token of this process, which only its own pages know.
"""

import asyncio
import ipaddress
import json
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltax.errors import UserError
from deltax.site import pages
from deltax.site.pages import Site
from deltax.site.render import ALONE, ASSETS, POLICY, page

BEAT = 1.0
"""Seconds between two looks at the store."""

LARGEST = 1_000_000
"""Bytes of a request's body."""

_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_ALONE = {"Content-Security-Policy": ALONE}


def serve(
    site: Site | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8753,
    reach: Literal["loopback", "everyone"] = "loopback",
    visit: Literal["browser", "none"] = "none",
) -> None:
    """Serve until stopped. Raises UserError for a host that other machines reach, unless `reach` says so, and for a
    port that is taken."""
    check_host(host, reach)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --port") from None
        port = listener.getsockname()[1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"Δx is at {address} (stop with Ctrl-C)", flush=True)
        if visit == "browser":
            webbrowser.open(address)
        site, stopping = site or Site(), threading.Event()
        site.notes.items()  # read once, so that the first page does not wait for it
        names = {host, "localhost", "127.0.0.1", "[::1]"} if reach == "loopback" else {host, "*"}
        config = uvicorn.Config(
            app(site, hosts=names, stopping=stopping),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        _Server(config, stopping).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Tells pages that listen for events when it stops: they would keep it waiting."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event):
        super().__init__(config)
        self.stopping = stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stopping.set()
        super().handle_exit(sig, frame)


def check_host(host: str, reach: Literal["loopback", "everyone"] = "loopback") -> None:
    """Raises UserError unless `host` is this machine alone, or `reach` is everyone."""
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost" and reach == "loopback":
        raise UserError(
            f"{host} can be reached by other machines, which could then read and edit your notes: "
            "leave out --host, or add --expose if you mean it"
        )


def app(site: Site | None = None, *, hosts: set[str] | None = None, stopping: threading.Event | None = None) -> ASGIApp:
    """The application. `hosts` are the names it answers to, "*" for any: a page elsewhere that points a name of its
    own here is refused. When `stopping` is set, streams end."""
    site, stopping = site or Site(), stopping or threading.Event()
    token = secrets.token_urlsafe(24)
    hosts = {"localhost", "127.0.0.1", "[::1]"} if hosts is None else hosts

    def html(template: str, data: dict[str, Any], root: str = "", status: int = 200) -> Response:
        return HTMLResponse(page(template, data, root=root, token=token), status)

    def index(request: Request) -> Response:
        return html("genealogy.html", pages.genealogy(site))

    def paper(request: Request) -> Response:
        return html("paper.html", pages.paper(site, request.path_params["key"]), "../")

    def comparisons(request: Request) -> Response:
        return html("comparisons.html", pages.comparisons(site))

    def comparison(request: Request) -> Response:
        return html("comparison.html", pages.comparison(site, request.path_params["name"]), "../")

    def figures_of(request: Request) -> Response:
        return JSONResponse(site.runs.comparison(request.path_params["name"]))

    def report(request: Request) -> Response:
        return HTMLResponse(pages.report(site, request.path_params["name"]), headers=_ALONE)

    def compose(request: Request) -> Response:
        return html("compose.html", pages.compositions(site))

    def library(request: Request) -> Response:
        return html("library.html", pages.library(site))

    def note(request: Request) -> Response:
        return html("note.html", pages.note(site, request.path_params["number"]), "../")

    def figure(request: Request) -> Response:
        path = pages.figure(site, request.path_params["file"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/svg+xml", headers=_ALONE)

    def search(request: Request) -> Response:
        return JSONResponse({"ids": site.notes.search(request.query_params.get("q", ""))})

    def diff(request: Request) -> Response:
        key = site.record(request.path_params["key"]).key
        return JSONResponse(site.trees.diffs([key])[key])

    def compositions(request: Request) -> Response:
        return JSONResponse(site.trees.compositions())

    async def change(request: Request) -> Response:
        return await run_in_threadpool(_change, site, request.path_params["number"], await _body(request))

    async def events(request: Request) -> Response:
        return StreamingResponse(_events(site, request, stopping), media_type="text/event-stream")

    def known(request: Request, error: Exception) -> Response:
        """A mistake in an address or a request, in words, as a page or as JSON."""
        if isinstance(error, HTTPException):
            status, words = error.status_code, error.detail
        else:
            status, words = 404 if request.method == "GET" else 400, str(error)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": words}, status)
        depth = request.url.path.count("/") - 1
        return html("missing.html", {"message": words.rstrip(".")}, "../" * depth, status)

    routes = [
        Route("/", index),
        Route("/index.html", index),
        Route("/paper/{key}.html", paper),
        Route("/comparisons.html", comparisons),
        Route("/comparison/{name}.report.html", report),
        Route("/comparison/{name}.html", comparison),
        Route("/comparison/{name}.json", figures_of),
        Route("/compose.html", compose),
        Route("/library.html", library),
        Route("/note/{number:int}.html", note),
        Route("/evidence/{file:path}", figure),
        Route("/events", events),
        Route("/api/search", search),
        Route("/api/diff/{key}", diff),
        Route("/api/compose", compositions),
        Route("/api/note/{number:int}", change, methods=["POST"]),
        Route("/favicon.ico", lambda request: RedirectResponse("/assets/icon.svg")),
        Mount("/assets", StaticFiles(directory=ASSETS)),
    ]
    inner = Starlette(routes=routes, exception_handlers={UserError: known, HTTPException: known})
    return _Guard(inner, hosts, token)


class _Guard:
    """Refuses hosts that are not ours and writes that are not from our pages; adds the headers of every answer."""

    def __init__(self, app: ASGIApp, hosts: set[str], token: str):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], scope["scheme"], Headers(scope=scope))
        if refusal:
            await JSONResponse({"error": refusal}, 403, headers=_HEADERS)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not scope["path"].startswith("/assets/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, sending)

    def _refusal(self, method: str, scheme: str, headers: Headers) -> str:
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if "*" not in self.hosts and name not in self.hosts:
            return f"this server does not answer to the name {name!r}"
        if method in ("GET", "HEAD"):
            return ""
        if headers.get("origin") != f"{scheme}://{host}":
            return "a change must come from a page of this server"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "a change must come from a page of this server"
        if not secrets.compare_digest(headers.get("x-deltax-token", "").encode(), self.token.encode()):
            return "this page is from before the server was started again: reload it"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "a change is sent as JSON"
        return ""


async def _body(request: Request) -> dict[str, Any]:
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > LARGEST:
            raise HTTPException(413, f"a note holds at most {LARGEST} bytes")
    try:
        found = json.loads(received)
    except ValueError:
        raise UserError("the request is not JSON") from None
    if not isinstance(found, dict):
        raise UserError("the request is not a JSON object")
    return found


def _change(site: Site, number: int, wanted: dict[str, Any]) -> Response:
    """The note as it stands now; `warning` says why a file could not take the change, which the library has."""
    where = wanted.pop("file", False)
    site.notes.item(number)
    warning = ""
    if where is True:
        try:
            site.notes.change_file(number, wanted)
        except UserError as error:
            site.notes.change(number, wanted)
            warning = str(error)
    else:
        site.notes.change(number, wanted)
    found = pages.note(site, number)["note"]
    return JSONResponse(
        {k: found[k] for k in ("id", "state", "text", "html", "priority", "title")} | {"warning": warning}
    )


async def _events(site: Site, request: Request, stopping: threading.Event) -> AsyncIterator[str]:
    """What trains now, each time that it changed. Ends quietly when the page or the server goes."""
    told, silent = "", 0
    with suppress(asyncio.CancelledError):
        while not stopping.is_set() and not await request.is_disconnected():
            now = json.dumps(await run_in_threadpool(site.runs.live))
            if now != told:
                told, silent = now, 0
                yield f"data: {now}\n\n"
            elif (silent := silent + 1) % 15 == 0:
                yield ": still here\n\n"
            await asyncio.sleep(BEAT)
