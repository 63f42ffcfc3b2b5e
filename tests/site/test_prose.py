"""Notes are written by others: nothing in them may run, load or lead elsewhere than it says."""

import json
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltax.site import prose
from deltax.site.render import data

TAGS = {
    *("p", "br", "em", "strong", "s", "a", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "span", "div", "input"),
    *("table", "thead", "tbody", "tr", "th", "td", *(f"h{i}" for i in range(1, 7))),
}
ATTRIBUTES = {"href", "rel", "class", "start", "type", "disabled", "checked", "title"}


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def check(html, pages=()):
    for tag, attributes in Elements(html).found:
        assert tag in TAGS, tag
        assert set(attributes) <= ATTRIBUTES, attributes
        href = attributes.get("href")
        assert href is None or re.match(r"(https?:|mailto:)", href) or href in pages, href


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1)) [b](\tjavascript:alert(1)) [c](java\nscript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>) ![b](data:image/svg+xml,x)",
    "[a](vbscript:x) <javascript:alert(1)> [r][r]\n\n[r]: javascript:alert(1)",
    '[a](https://x.y/"onmouseover="alert(1)) [b](https://x.y "\\" onclick=\\"alert(1)")',
    "![tracked](https://evil.example/pixel.png)",
    '[[x"><img src=x onerror=alert(1)>|<b>]] ![[<script>]]',
    "$</span><script>alert(1)</script>$",
    "$$\\href{javascript:alert(1)}{x}$$",
    '```html"><script>alert(1)</script>\nx\n```',
    "| a |\n|---|\n| <script>alert(1)</script> |",
    '- [ ] <input onfocus=alert(1) autofocus>\n- [x] "><svg onload=alert(1)>',
    "&lt;script&gt; &#60;script&#62; &#x6A;avascript:alert(1)",
    "[a](&#x6A;avascript:alert(1)) [b](file:///etc/passwd) [c](//evil.example)",
    "<!-- --><!DOCTYPE x><![CDATA[<script>]]>",
    "\x00<scr\x00ipt>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_notes_are_text(text):
    html = prose.html(text)
    check(html)
    assert "<script" not in html and "javascript:" not in str([a for _, a in Elements(html).found])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*HOSTILE, *"[]()!<>$|`*_\"'\n:&#\\", "https://a.b", "onload="]), max_size=12))
def test_no_mixture_breaks_out(pieces):
    check(prose.html("".join(pieces)))


def test_what_a_reader_writes_is_kept():
    html = prose.html(
        "**x** but *with* `y`, see https://arxiv.org/abs/1\n\n- [x] read\n- [ ] todo\n\t- $UU^{\\dagger}$ and $$a<b$$"
    )
    assert "<strong>x</strong>" in html and 'href="https://arxiv.org/abs/1"' in html
    assert html.count("<input") == 2 and html.count('checked="checked"') == 1
    assert '<span class="math">UU^{\\dagger}</span>' in html and '<span class="math display">a&lt;b</span>' in html


def test_money_is_no_formula():
    assert "math" not in prose.html("it costs $5 or $6")


def test_wiki_links_lead_to_notes_that_have_a_page():
    html = prose.html("[[DyT#why|that one]] ![[Absent]]", {"dyt": "../note/3.html"})
    assert '<a href="../note/3.html">that one</a>' in html and '<span class="wiki">Absent</span>' in html


def test_pictures_load_nothing():
    assert prose.html("![a graph](https://x.y/g.png)").strip() == (
        '<p><a href="https://x.y/g.png" rel="noopener noreferrer nofollow">a graph</a></p>'
    )


@pytest.mark.parametrize("piece", ["[", "![[", "*a ", "> ", "`", "<", "http://a", "[[a", "|a", "$"])
def test_a_long_note_of_brackets_takes_a_moment(piece):
    began = time.process_time()
    check(prose.html(piece * (1_000_000 // len(piece))))
    check(prose.html(" ".join([(piece * 900)[:900]] * 20)))
    assert time.process_time() - began < 3


def test_links_of_other_schemes_are_none():
    assert prose.link("https://a.b") and prose.link("mailto:a@b.c")
    assert not any(map(prose.link, ["javascript:x", " javascript:x", "ftp://a", "//a.b", "file:///x", "", "httpsx:"]))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_data_never_ends_its_script(text):
    found = str(data({"x": text + "</script><!--<script>"}))
    assert "<" not in found and ">" not in found and "&" not in found and "\u2028" not in found
    assert json.loads(found)["x"].startswith(text)
