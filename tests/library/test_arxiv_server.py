"""arXiv's API as a server on this machine: `dx notes fetch` in processes of its own, refused, cut off and killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from deltax.library import arxiv
from deltax.library.importing import import_paths
from deltax.library.store import Library

ENTRY = """<entry><id>http://arxiv.org/abs/{id}v1</id><published>2024-01-02T00:00:00Z</published>
<title>Paper {id}</title><summary>S</summary><author><name>A. One</name></author></entry>"""
COMMAND = """
import sys
from deltax.library import actions, arxiv, commands
from deltax.library.join import Catalogue
arxiv.API, arxiv.SECONDS, arxiv.BATCH = sys.argv[1], float(sys.argv[2]), 2
actions.catalogue = Catalogue
sys.exit(commands.main(["notes", "fetch"]))
"""
APART = 0.4


class Api(ThreadingHTTPServer):
    """Answers in Atom; 429 to a request less than `apart` seconds after the one before. `cut` answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/api/query"
        self.asked: list[list[str]] = []
        self.times: list[float] = []
        self.refused, self.cut, self.hold, self.at_once, self.most = 0, 0, threading.Event(), 0, 0
        self.hold.set()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self):
        api, now = self.server, time.monotonic()
        with api.lock:
            api.at_once += 1
            api.most = max(api.most, api.at_once)
            early = bool(api.times) and now - api.times[-1] < APART * 0.9
            api.times.append(now)
            api.refused += early
        try:
            self.answer(api, early)
        finally:
            with api.lock:
                api.at_once -= 1

    def answer(self, api: Api, early: bool) -> None:
        if early:
            self.send_error(429)
            return
        ids = parse_qs(urlsplit(self.path).query)["id_list"][0].split(",")
        api.asked.append(ids)
        api.hold.wait(20)
        body = f'<feed xmlns="http://www.w3.org/2005/Atom">{"".join(ENTRY.format(id=i) for i in ids)}</feed>'.encode()
        self.send_response(200)
        if api.cut:
            api.cut -= 1
            self.protocol_version = "HTTP/1.1"
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n<feed>")
            self.close_connection = True
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def api():
    with Api() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.hold.set()
        server.shutdown()


@pytest.fixture
def six(tmp_path):
    """A library with six papers of which only the addresses are known."""
    (tmp_path / "list.md").write_text("".join(f"- [ ] https://arxiv.org/abs/2401.0000{n}\n" for n in range(1, 7)))
    with Library() as library:
        import_paths(library, [tmp_path / "list.md"])


def _start(api: Api) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND, api.url, str(APART)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def _titles() -> list[str]:
    with Library() as library:
        return [item.entry.title for item in library.items()]


def test_batches_wait_for_their_turn_also_between_processes_and_are_kept(api, six):
    both = [_start(api), _start(api)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert api.refused == 0 and api.most == 1
    assert _titles() == [f"Paper 2401.0000{n}" for n in range(1, 7)]
    before = len(api.asked)
    again = _start(api)
    assert "knows 6 of 6" in again.communicate(timeout=60)[0] and len(api.asked) == before


def test_a_killed_fetch_goes_on_where_it_was(api, six):
    process = _start(api)
    deadline = time.monotonic() + 30
    while len(api.asked) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    api.hold.clear()
    while len(api.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    with Library() as library:
        known = arxiv.cached(library, [f"2401.0000{n}" for n in range(1, 7)])
    assert sorted(known) == ["2401.00001", "2401.00002"]
    api.hold.set()
    time.sleep(APART)
    again = _start(api)
    assert "knows 6 of 6" in again.communicate(timeout=60)[0]
    asked = [sorted(ids) for ids in api.asked]
    assert asked.count(["2401.00001", "2401.00002"]) == 1 and asked[2:] == [
        ["2401.00003", "2401.00004"],
        ["2401.00005", "2401.00006"],
    ]
    assert _titles() == [f"Paper 2401.0000{n}" for n in range(1, 7)]


def test_an_answer_that_breaks_off_and_a_refusal_are_sentences(api, six):
    api.cut = 1
    process = _start(api)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in error and "run it again" in error
    api.times.append(time.monotonic() + 60)  # whatever comes now comes too early
    process = _start(api)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in error and "answered 429" in error
