"""The pages in a real browser."""

import re
import time

import browsers
import fakes
import pytest

from deltax.site.build import build

pytestmark = pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing())


@pytest.fixture(scope="module")
def chromium():
    with browsers.browser() as opened:
        yield opened


def until(page, condition, patience=15):
    """Wait for a JavaScript expression to hold. Playwright's own wait evaluates strings, which the policy forbids."""
    end = time.monotonic() + patience
    while not _holds(page, condition):
        assert time.monotonic() < end, f"it never came that {condition}"
        time.sleep(0.02)


def _holds(page, condition):
    from playwright.sync_api import Error

    try:
        return page.evaluate(condition)
    except Error as error:
        if "context was destroyed" in str(error):  # the page reloads itself
            return False
        raise


class Watched:
    """A page on which nothing goes wrong: no error, no refusal by the policy, no request to elsewhere."""

    def __init__(self, page, home):
        self.page, self.home, self.wrong = page, home, []
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        page.on("request", lambda asked: asked.url.startswith(home) or self.wrong.append(f"asked for {asked.url}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))

    def open(self, address="", ready=True):
        self.page.goto(self.home + address)
        if ready:
            self.page.wait_for_selector("html[data-ready]")
        return self.page


@pytest.fixture
def at(chromium):
    """Pages at an address, watched to the end of the test."""
    contexts, watched = [], []

    def opened(home, **settings):
        contexts.append(chromium.new_context(**settings))
        watched.append(Watched(contexts[-1].new_page(), home))
        return watched[-1]

    yield opened
    wrong = [line for w in watched for line in w.wrong]
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def served(mine):
    with browsers.serving(mine) as home:
        yield home


@pytest.fixture(scope="module")
def shown(fake):
    with browsers.serving(fake) as home:
        yield home


def test_the_front_page_opens_and_leads_to_a_paper(at, shown, fake):
    page = at(shown).open()
    assert page.locator(".node").count() == len(fake.papers)
    key = next(iter(fake.papers))
    page.locator(f'.node[data-key="{key}"]').click()
    page.wait_for_url(f"**/paper/{key}.html")
    assert page.locator("h1").inner_text() == fake.papers[key].sentence
    assert page.locator(".claim .badge.supported").count() == 1
    assert page.locator("svg.interval .range").count() == 1
    assert page.locator(".figures img").evaluate("img => img.decode().then(() => img.naturalWidth > 0)")


def test_search_finds_a_paper_in_the_graph_and_in_the_list(at, shown, fake):
    page = at(shown).open()
    key = list(fake.papers)[17]
    page.keyboard.press("/")
    page.keyboard.type(key)
    until(page, "document.querySelectorAll('#papers > li:not([hidden])').length === 1")
    assert page.locator("#papers > li:visible a").inner_text() == key
    assert page.locator(".node:not(.off)").get_attribute("data-key") == key
    assert page.locator("#count").inner_text() == f"1 of {len(fake.papers)}"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.key") == key
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/paper/{key}.html")


def test_filters_and_the_address_that_remembers_them(at, shown, fake):
    watched = at(shown)
    page = watched.open()
    field = fake.papers[list(fake.papers)[3]].field
    page.select_option("#field", field)
    count = sum(r.field == field for r in fake.papers.values())
    assert page.locator("#papers > li:visible").count() == count
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#papers > li:visible").count() == count
    page.select_option("#field", "")
    page.select_option("#standing", "supported")
    until(page, "document.querySelectorAll('.node:not(.off)').length < 10")
    assert page.locator(".node.supported:not(.off)").count() == page.locator(".node:not(.off)").count() > 0


def lineage(papers, key, way):
    found, front = set(), [key]
    while front:
        front = [k for f in front for k in way(f) if k in papers and k not in found]
        found |= set(front)
    return found


def test_pointing_at_a_paper_traces_ancestors_and_descendants(at, shown, fake):
    papers = fake.papers
    up = {k: lineage(papers, k, lambda f: papers[f].on) for k in papers}
    down = {k: {d for d in papers if k in up[d]} for k in papers}
    key = max(papers, key=lambda k: min(len(up[k]), len(down[k])))
    assert up[key] and down[key]
    page = at(shown).open()
    page.locator(f'.node[data-key="{key}"] .mark').hover(force=True)
    page.wait_for_selector("#card .counts")
    keys = lambda kind: {n.get_attribute("data-key") for n in page.locator(f".node.{kind}").all()}
    assert keys("up") == up[key] and keys("down") == down[key] and keys("self") == {key}
    assert f"{len(up[key])} ancestor" in page.locator("#card").inner_text()
    assert page.locator(".edges path.up").count() >= len(up[key])
    page.mouse.move(2, 2)
    until(page, "document.querySelectorAll('.node.up').length === 0")


def test_the_keyboard_alone_traces_and_opens(at, shown, fake):
    page = at(shown).open()
    page.locator(".node[tabindex='0']").focus()
    first = page.evaluate("document.activeElement.dataset.key")
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.dataset.key")
    assert second and second != first and fake.papers[second].year >= fake.papers[first].year
    assert page.locator(".node.self").get_attribute("data-key") == second
    assert page.locator(".node[tabindex='0']").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement.querySelector('.ringed')).stroke") != "none"
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/paper/{second}.html")


def test_zoom_moves_papers_apart_and_back(at, shown):
    page = at(shown).open()
    width = """(() => {
      const x = [...document.querySelectorAll('.node')].map(n => parseFloat(n.getAttribute('transform').slice(10)));
      return Math.max(...x) - Math.min(...x);
    })()"""
    before = page.evaluate(width)
    page.click("#closer")
    until(page, f"{width} > 1.5 * {before}")
    page.click("#fit")
    until(page, f"Math.abs({width} - {before}) < 2")


def test_marking_a_note_as_read_is_kept(at, served, mine):
    watched = at(served)
    page = watched.open("library.html")
    row = page.locator('.row[data-id="2"]')
    mine_before = mine.notes.item(2).entry.state
    page.select_option("#state", mine_before)
    row.locator("button.tick").click()
    until(page, "document.getElementById('said').textContent !== ''")
    after = "todo" if mine_before == "done" else "done"
    assert mine.notes.item(2).entry.state == after
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator('.row[data-id="2"] button.tick').get_attribute("aria-pressed") == str(after == "done").lower()


def test_a_hostile_note_is_text_and_its_math_is_drawn(at, served, mine):
    page = at(served).open("note/1.html", ready=False)
    hostile = (
        "<script>alert(1)</script><img src=x onerror=alert(2)> [go](javascript:alert(3)) "
        '[[x"><svg onload=alert(4)>]] ![p](https://evil.example/p.png)\n\n'
        "$\\frac{a}{b}$ and $\\href{javascript:alert(5)}{click}$ and $\\includegraphics{https://evil.example/q.png}$ "
        "and $\\htmlStyle{background:url(https://evil.example/r.png)}{z}$"
    )
    page.click("#edit")
    page.fill("#text", hostile)
    page.click("button[type=submit]")
    page.wait_for_selector("#written .katex .mfrac")
    assert mine.notes.item(1).entry.text == hostile
    assert "<script>alert(1)</script>" in page.locator("#written").inner_text()
    inside = "document.getElementById('written').querySelectorAll"
    assert page.evaluate(f"{inside}('script, img, svg[onload], [onerror], [onclick]').length") == 0
    hrefs = page.evaluate(f"[...{inside}('[href]')].map(a => a.getAttribute('href'))")
    assert hrefs == ["https://evil.example/p.png"]
    page.reload()
    page.wait_for_selector("#written .katex .mfrac")


def test_a_note_in_its_paper_and_the_file_if_asked(at, served, mine, tmp_path):
    page = at(served).open("note/1.html", ready=False)
    page.click("#edit")
    page.fill("#text", "- asked for")
    page.check("#file")
    page.keyboard.press("Tab")
    page.click("button[type=submit]")
    until(page, "document.getElementById('said').textContent === 'Saved'")
    assert "\t- asked for\n" in (tmp_path / "notes" / "list.md").read_text()
    key = mine.notes.paper(mine.notes.item(1))
    page.goto(f"{served}paper/{key}.html")
    assert "asked for" in page.locator(".note").inner_text()


def test_a_live_comparison_moves_by_itself(at, served, mine):
    page = at(served).open("comparisons.html", ready=False)
    assert page.locator("#live").is_hidden()
    fakes.train(mine.runs.folder, "gpt+dyt", 3, 75, 3.25)
    page.wait_for_selector('[data-run="gpt+dyt-3"]')
    assert page.locator(".ongoing").count() == 0
    assert "75 of 300 steps · 3.250 nats · 18k tokens/s" in page.locator("[data-run]").inner_text()
    fakes.train(mine.runs.folder, "gpt+dyt", 3, 225, 2.5)
    until(page, "document.querySelector('[data-run] progress')?.value === 0.75")
    store = fakes.Store(mine.runs.folder)
    with store.announced("comparing", fakes.announcement("p", "gpt", "gpt+dyt")):
        page.wait_for_selector('[data-plan="p"] [data-run="gpt+dyt-3"]')
        assert page.locator(".ongoing h3").inner_text() == "gpt · gpt+dyt"
        assert "0 of about 12 runs done" in page.locator(".ongoing").inner_text()
    until(page, "document.querySelectorAll('.ongoing').length === 0")
    store.remember("comparison", "another", fakes.comparison())
    store.close()
    until(page, "document.querySelectorAll('table tbody tr').length === 4")


def test_curves_on_every_axis_and_a_sorted_table(at, shown, fake):
    name = next(iter(fake.runs.comparisons()))
    page = at(shown).open(f"comparison/{name}.html", ready=False)
    page.wait_for_selector("path.curve")
    assert page.locator("path.curve").count() == page.locator("path.band").count() == 3
    for axis in ("seconds", "FLOPs"):
        page.check(f"input[value={axis}]")
        until(page, f"document.querySelector('#chart').textContent.includes('{axis}')")
        assert page.locator("path.curve").count() == 3
    page.check("input[value=bytes]")
    page.wait_for_selector(".points circle")
    assert page.locator(".points circle").count() == 15
    page.get_by_role("button", name="bits per byte").click()
    assert page.locator("tbody tr th code").all_inner_texts()[:3] == ["gpt+alibi", "gpt", "gpt+dyt"]
    assert page.locator("th[aria-sort=ascending]").inner_text() == "bits per byte"
    fake.reports.of(fake.runs.comparison(name))  # drawn beforehand: a busy machine takes its time
    page.get_by_role("link", name="The report").click()
    page.wait_for_url(f"**/comparison/{name}.report.html")
    assert page.locator("svg").count() == 4 and "Holm" in page.locator("body").inner_text()
    assert page.locator(".key").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(124, 133, 148)"


def test_which_deltas_compose_is_a_table_and_a_list(at, shown):
    page = at(shown).open("compose.html", ready=False)
    page.wait_for_selector("#matrix td.excludes")
    assert page.locator("#matrix tbody tr").count() == 12
    page.locator("#matrix td.excludes").first.click()
    assert "Excludes" in page.locator("#found").inner_text()


def test_light_and_dark(at, shown):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page = at(shown, color_scheme="dark").open()
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == light
    assert at(shown, color_scheme="light").open().evaluate(ground) == light


@pytest.mark.parametrize("address", ["", "library.html", "comparisons.html", "compose.html", "note/1.html", "paper"])
def test_a_phone_scrolls_in_one_direction_only(at, shown, fake, address):
    address = f"paper/{next(iter(fake.papers))}.html" if address == "paper" else address
    page = at(shown, viewport={"width": 360, "height": 720}, has_touch=True).open(address, ready=False)
    page.wait_for_load_state("networkidle" if "comparisons" not in address else "load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_no_year_is_cut_off_on_a_phone(at, shown):
    page = at(shown, viewport={"width": 360, "height": 720}, has_touch=True).open()
    left = "[...document.querySelectorAll('.axis text:not([hidden])')].map((t) => t.getBoundingClientRect().left)"
    assert min(page.evaluate(left)) >= 0


@pytest.mark.parametrize("address", ["", "library.html", "comparisons.html", "compose.html", "note/1.html", "paper"])
def test_everything_that_acts_has_a_name(at, shown, fake, address):
    address = f"paper/{next(iter(fake.papers))}.html" if address == "paper" else address
    page = at(shown).open(address, ready=False)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, select, textarea, svg[role=img], img')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.alt || e.labels?.length))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("h1").count() == 1 and page.locator("html[lang]").count() == 1


def test_text_can_be_read_in_both_themes(at, shown, fake):
    """Contrast of at least 4.5 to 1 (WCAG AA) between the colours of words and their ground."""

    def luminance(colour):
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        return sum(
            w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
            for w, p in zip((0.2126, 0.7152, 0.0722), parts)
        )

    for scheme in ("light", "dark"):
        page = at(shown, color_scheme=scheme).open()
        colours = page.evaluate(
            """() => { const probe = document.body.appendChild(document.createElement('p'));
            const of = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
            const names = ['ground', 'raised', 'ink', 'muted', 'up', 'down', 'good', 'bad', 'unclear'];
            return Object.fromEntries(names.map(n => [n, of(n)])); }"""
        )
        for ground in ("ground", "raised"):
            for word in ("ink", "muted", "up", "down", "good", "bad", "unclear"):
                a, b = sorted((luminance(colours[word]), luminance(colours[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (scheme, word, ground)


def test_the_site_works_from_a_folder(at, fake, tmp_path):
    out = tmp_path / "out"
    build(out, fake)
    watched = at(f"file://{out}/")
    page = watched.open("index.html")
    assert page.locator(".node").count() == len(fake.papers)
    key = list(fake.papers)[9]
    page.fill("#search", key)
    until(page, "document.querySelectorAll('#papers > li:not([hidden])').length === 1")
    page.click("#papers > li:not([hidden]) a")
    page.wait_for_url(f"**/paper/{key}.html")
    page.click("nav >> text=Library")
    page.wait_for_selector(".row")
    page.fill("#search", "number 57")
    until(page, "document.querySelectorAll('.row').length === 1")
    page.click(".row .what a")
    page.wait_for_selector("#written .katex")
    page.click("nav >> text=Comparisons")
    page.click("tbody a >> nth=0")
    page.wait_for_selector("path.curve")
    page.get_by_role("link", name="The report").click()
    page.wait_for_url("**/*.report.html")
    assert page.locator("svg").count() == 4


def test_thousands_of_notes_are_few_rows_at_a_time(at, tmp_path):
    site = fakes.site(tmp_path, papers=20, notes=2_000)
    with browsers.serving(site) as home:
        page = at(home).open("library.html")
        assert page.locator(".row").count() < 60
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_selector('.row[aria-posinset="2000"]')
        assert page.locator(".row").count() < 60
        page.fill("#search", "number 1999")
        until(page, "document.getElementById('count').textContent !== ''")
        assert "Paper number 1999" in page.locator(".row").first.inner_text()
