"""A real browser for tests and benchmarks: Debian's Chromium, driven by Playwright, which downloads none."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from deltax.site import server

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


def chromium() -> str | None:
    """Where Chromium is; $DELTAX_CHROMIUM counts first."""
    named = os.environ.get("DELTAX_CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [named] if named else [shutil.which(name) for name in names]
    return next((path for path in found if path and Path(path).exists()), None)


def missing() -> str:
    """Why no browser can be used, or ""."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package playwright is not installed: pip install 'deltax-ml[test]'"
    return "" if chromium() else "Chromium is not installed: apt-get install chromium, or set DELTAX_CHROMIUM"


@contextmanager
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield opened
        opened.close()


@contextmanager
def serving(site) -> Iterator[str]:
    """The site on a free port of this machine; its address."""
    stopping = threading.Event()
    config = uvicorn.Config(
        server.app(site, stopping=stopping), port=0, log_level="warning", timeout_graceful_shutdown=3
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    stopping.set()
    running.should_exit = True
    thread.join(5)
