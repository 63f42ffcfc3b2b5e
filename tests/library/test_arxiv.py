"""arXiv's API without a network: manners, cache, resumption, hardened XML."""

import re

import pytest

from deltax.errors import UserError
from deltax.library import arxiv
from deltax.library.store import Library

ENTRY = """<entry><id>http://arxiv.org/abs/{id}v2</id><published>2025-03-13T17:59:06Z</published>
<title>Paper
  {id}</title><summary> Words. </summary><author><name>A. One</name></author><author><name>B. Two</name></author>
<arxiv:doi xmlns:arxiv="http://arxiv.org/schemas/atom">10.1/x</arxiv:doi>
<arxiv:primary_category xmlns:arxiv="http://arxiv.org/schemas/atom" term="cs.LG"/></entry>"""


class Server:
    def __init__(self, fail_at: int = 0):
        self.asked: list[list[str]] = []
        self.fail_at = fail_at

    def __call__(self, url: str) -> bytes:
        assert url.startswith(arxiv.API)
        ids = re.search(r"id_list=([^&]+)", url)[1].replace("%2C", ",").split(",")
        self.asked.append(ids)
        if len(self.asked) == self.fail_at:
            raise OSError("the line is down")
        found = "".join(ENTRY.format(id=i) for i in ids if i != "2501.99999")
        return f'<feed xmlns="http://www.w3.org/2005/Atom">{found}</feed>'.encode()


def test_metadata_is_fetched_once_and_kept():
    slept: list[float] = []
    server = Server()
    with Library() as library:
        found = arxiv.fetch(library, ["2503.10622", "2501.99999"], server, slept.append)
        assert found["2503.10622"] == arxiv.Metadata(
            "2503.10622", "Paper 2503.10622", ("A. One", "B. Two"), 2025, "Words.", "10.1/x", "", "cs.LG"
        )
        assert "2501.99999" not in found and slept == []
        assert arxiv.fetch(library, ["2503.10622"], server, slept.append) == found
        assert arxiv.cached(library, ["2503.10622", "2106.09685"]) == found
    assert server.asked == [["2503.10622", "2501.99999"]]


def test_batches_of_fifty_three_seconds_apart_go_on_where_they_broke_off():
    ids = [f"2401.{n:05}" for n in range(1, 121)]
    slept: list[float] = []
    server = Server(fail_at=3)
    with Library() as library:
        with pytest.raises(UserError, match="kept, run it again"):
            arxiv.fetch(library, ids, server, slept.append)
        assert [len(asked) for asked in server.asked] == [50, 50, 20]
        assert len(slept) == 2 and all(2 < seconds <= 3 for seconds in slept)
        assert len(arxiv.fetch(library, ids, server, slept.append)) == 120
    assert [len(asked) for asked in server.asked] == [50, 50, 20, 20] and len(slept) == 3


@pytest.mark.parametrize(
    "body, words",
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><feed>&b;</feed>', "document type"),
        (b"<feed><entry>", "no XML"),
        (b"Rate exceeded.", "no XML"),
        (b"<" + b"a" * (17 << 20), "larger"),
    ],
)
def test_other_answers_are_refused(body, words):
    with Library() as library, pytest.raises(UserError, match=words):
        arxiv.fetch(library, ["2503.10622"], lambda url: body)


def test_only_ids_are_asked_for():
    with Library() as library, pytest.raises(UserError, match="no arXiv id"):
        arxiv.fetch(library, ["x&id_list=y"], Server())
