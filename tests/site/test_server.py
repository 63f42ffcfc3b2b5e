"""The pages over HTTP: who may read, who may change, and what an answer allows."""

import json
import re
import subprocess
import sys

import fakes
import pytest
from starlette.testclient import TestClient

from deltax.errors import UserError
from deltax.site import server
from deltax.site.render import ALONE, POLICY

ORIGIN = "http://127.0.0.1:8753"


def addresses(site):
    yield from ("/", "/index.html", "/comparisons.html", "/compose.html", "/library.html")
    yield from (f"/paper/{key}.html" for key in site.papers)
    yield f"/note/{site.notes.items()[0].id}.html"
    for name in site.runs.comparisons():
        yield from (f"/comparison/{name}.html", f"/comparison/{name}.json")


def token(client):
    return re.search(r'name="dx-token" content="([^"]+)"', client.get("/").text)[1]


def write(client, number=1, value=None, **headers):
    told = {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin", "X-Deltax-Token": token(client)}
    told |= {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    body = json.dumps({"state": "done"} if value is None else value)
    return client.post(f"/api/note/{number}", content=body, headers={k: v for k, v in told.items() if v is not None})


@pytest.fixture
def own(mine):
    return TestClient(server.app(mine), base_url=ORIGIN)


def test_every_page_comes_with_its_guards(client, fake):
    for address in addresses(fake):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert answer.headers["content-security-policy"] == f"{POLICY}; frame-ancestors 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_no_page_has_a_script_or_a_style_of_its_own(client, fake):
    """The policy refuses them; every script is a file, and every block of data is JSON."""
    for address in addresses(fake):
        text = client.get(address).text
        for tag in re.findall(r"<script[^>]*>", text):
            assert "src=" in tag or 'type="application/json"' in tag
        if address.endswith(".html"):
            assert not re.search(r"<[^>]+\s(style|on\w+)\s*=", re.sub(r"<script.*?</script>", "", text, flags=re.S))
            assert "<style" not in text


def test_what_papers_say_is_escaped(client, fake):
    text = client.get(f"/paper/{next(iter(fake.papers))}.html").text
    assert "<b>says</b>" not in text and "&lt;b&gt;says&lt;/b&gt;" in text
    assert "&lt;exactly&gt;" in text and "Twice(&lt;b&gt;)" in text


@pytest.mark.parametrize("address", ["/paper/nothing.html", "/note/999.html", "/comparison/x.html", "/nothing"])
def test_what_is_not_here_is_said_in_words(client, address):
    answer = client.get(address)
    assert answer.status_code == 404 and "Not here" in answer.text and "Traceback" not in answer.text


@pytest.mark.parametrize(
    "address",
    ["/evidence/../library.sqlite", "/evidence/%2e%2e/library.sqlite", "/evidence/flash-0.json", "/assets/../pages.py"],
)
def test_only_figures_and_assets_are_files(client, address):
    assert client.get(address).status_code == 404


def test_a_figure_may_do_nothing(client, fake):
    answer = client.get(f"/evidence/figures/{next(iter(fake.papers))}.svg")
    assert (
        answer.headers["content-type"].startswith("image/svg")
        and "sandbox" in answer.headers["content-security-policy"]
    )


def test_a_report_stands_alone_and_may_do_nothing(own, mine):
    store = fakes.Store(mine.runs.folder)
    hostile = fakes.comparison()
    hostile["rows"][1]["name"] = hostile["environment"]["cpu"] = "</style><script>alert(1)</script>"
    old = {k: v for k, v in fakes.comparison().items() if k != "seeds"}
    store.remember("comparison", "hostile", hostile)
    store.remember("comparison", "old", old)
    store.close()
    of_old, of_hostile, _ = mine.runs.comparisons()
    for again in range(2):
        answer = own.get(f"/comparison/{of_hostile}.report.html")
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == ALONE, again
        assert "<script" not in answer.text and "&lt;script&gt;" in answer.text and answer.text.count("<svg") == 4
    assert "img-src data:;" in ALONE  # pictures inside a figure or a report
    assert "script" not in ALONE and "default-src 'none'" in ALONE and "allow" not in ALONE
    assert f"{of_hostile}.report.html" in own.get(f"/comparison/{of_hostile}.html").text
    assert ".report.html" not in own.get(f"/comparison/{of_old}.html").text
    answer = own.get(f"/comparison/{of_old}.report.html")
    assert answer.status_code == 404 and "compare again" in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8753", "127.0.0.1.evil.example:8753", "", "[::2]:8753"])
def test_a_name_of_somebody_else_is_refused(client, host):
    """DNS rebinding: a page elsewhere points its own name at this machine."""
    assert client.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8753", "127.0.0.1:9", "[::1]:8753", "[::1]", "localhost"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_a_page_of_this_server_may_change_a_note(own, mine):
    answer = write(own, value={"text": "new <script>x</script> $a^2$", "state": "done"})
    assert answer.status_code == 200 and answer.json()["state"] == "done"
    assert answer.json()["html"] == '<p>new &lt;script&gt;x&lt;/script&gt; <span class="math">a^2</span></p>\n'
    assert mine.notes.item(1).entry.text == "new <script>x</script> $a^2$"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Origin": None},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"X_Deltax_Token": "guess"},
        {"X_Deltax_Token": None},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ],
)
def test_no_other_page_may(own, mine, headers):
    before = mine.notes.item(1).entry
    assert write(own, value={"text": "changed"}, **headers).status_code == 403
    assert mine.notes.item(1).entry == before


@pytest.mark.parametrize("method", ["put", "delete", "patch", "options"])
def test_other_verbs_change_nothing(own, method):
    assert getattr(own, method)(
        "/api/note/1", headers={"Origin": ORIGIN, "X-Deltax-Token": token(own)}
    ).status_code in (403, 405)


@pytest.mark.parametrize("value", [{"ids": "x"}, {"state": "gone"}, [], 3, {"text": 3}])
def test_a_change_that_is_none_is_refused_in_words(own, value):
    answer = write(own, value=value)
    assert answer.status_code == 400 and answer.json()["error"]


def test_a_note_that_is_not_there_and_a_body_too_large(own):
    assert write(own, number=999).status_code == 400
    assert write(own, value={"text": "x" * 1_100_000}).status_code == 413


def test_the_file_is_written_only_if_asked(own, mine, tmp_path):
    file = tmp_path / "notes" / "list.md"
    before = file.read_bytes()
    item = mine.notes.items()[1]
    write(own, item.id, {"text": "- kept in the library"})
    assert file.read_bytes() == before
    answer = write(own, item.id, {"text": "- and in the file", "file": True})
    assert answer.json()["warning"] == ""
    after = file.read_bytes()
    assert b"\t- and in the file\n" in after
    assert [a for a, b in zip(before.split(b"\n"), after.split(b"\n")) if a != b] == [b"\t- it scales like $n^1$, why?"]


def test_a_file_that_changed_meanwhile_is_left_alone(own, mine, tmp_path):
    file = tmp_path / "notes" / "list.md"
    file.write_text("another file\n")
    item = mine.notes.items()[1]
    answer = write(own, item.id, {"text": "mine", "file": True})
    assert "changed since" in answer.json()["warning"] and file.read_text() == "another file\n"
    assert mine.notes.item(item.id).entry.text == "mine"


def test_search_and_diff_answer_as_data(client, fake):
    found = client.get("/api/search", params={"q": "Paper number 7"}).json()["ids"]
    assert fake.notes.item(found[0]).entry.title == "Paper number 7"
    assert client.get("/api/search", params={"q": '"; DROP TABLE entries; --'}).status_code == 200
    key = next(iter(fake.papers))
    assert client.get(f"/api/diff/{key}").json()["command"] == f"dx diff gpt gpt+{key}"
    assert client.get("/api/diff/nothing").status_code == 404 and client.get("/api/compose").json()["pairs"]


def test_other_machines_are_refused_unless_asked():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="--expose"):
            server.check_host(host)
        server.check_host(host, "everyone")
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        server.check_host(host)


def test_a_port_that_is_taken_is_said(fake):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="another --port"):
            server.serve(fake, port=taken.getsockname()[1])


def test_pages_load_no_torch():
    code = (
        "import sys; from deltax.lab import report; from deltax.site import server, build, pages; "
        "s = pages.Site(); pages.genealogy(s); "
        "pages.paper(s, 'dyt'); server.app(s); assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_live_runs_are_in_the_page(own, mine):
    fakes.train(mine.runs.folder, "gpt+dyt", 3, 150, 2.5)
    assert '"gpt+dyt"' in own.get("/comparisons.html").text
