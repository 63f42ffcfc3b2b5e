"""The pages at the size they are meant for: 400 papers and 10,000 notes, in Chromium and as files."""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import timing
from deltax.site.build import build

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "site"))
import browsers
import fakes

PAPERS, NOTES, ROUNDS = 400, 10_000, 7

FRAMES = """async (move) => {
  const step = new Function('i', move), times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < 90; i++) {
    step(i);
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times;
}"""
ZOOM = """const s = document.getElementById('graph'), b = s.getBoundingClientRect();
  s.dispatchEvent(new WheelEvent('wheel', {deltaY: i < 45 ? -40 : 40, ctrlKey: true, bubbles: true, cancelable: true,
  clientX: b.x + b.width * 0.7, clientY: b.y + b.height / 2}))"""
TRACE = """const n = document.querySelectorAll('.node')[i * 4];
  n.dispatchEvent(new PointerEvent('pointerenter', {pointerType: 'mouse'}))"""
SCROLL = "scrollTo(0, i * 7000)"


def main() -> None:
    if browsers.missing():
        sys.exit(f"this benchmark needs a browser: {browsers.missing()}")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = fakes.site(folder, papers=PAPERS, notes=NOTES)
        seconds = [_build(fakes.site(folder / "few", papers=PAPERS, notes=100), folder / f"out{i}") for i in range(3)]
        rows[f"static site of {PAPERS} papers"] = _summary(seconds, limit=20.0)
        whole = fakes.with_trees(folder / "few")
        rows[f"the same the first time, and every tree of {len(whole.papers)} papers"] = _summary(
            [_build(whole, folder / "cold")], limit=20.0
        )
        seconds = [_build(site, folder / "all")]
        rows[f"static site of {PAPERS} papers and {NOTES} notes"] = _summary(seconds)
        site.notes.items()  # as `dx serve` does before it says that it is there
        with browsers.serving(site) as home, browsers.browser() as browser:
            page = lambda: browser.new_context(viewport={"width": 1440, "height": 900}, bypass_csp=True).new_page()
            seconds = [_ready(page(), home) for _ in range(ROUNDS)]
            rows[f"front page, {PAPERS} papers, {NOTES} notes: interactive"] = _summary(seconds, limit=1.5)
            front = page()
            _ready(front, home)
            rows["a frame while zooming"] = _summary(_frames(front, ZOOM))
            _ready(front, home)
            rows["a frame while tracing one paper after another"] = _summary(_frames(front, TRACE))
            seconds = [_ready(page(), f"{home}library.html") for _ in range(ROUNDS)]
            rows[f"library, {NOTES} notes: interactive"] = _summary(seconds)
            library = page()
            _ready(library, f"{home}library.html")
            rows[f"a frame while scrolling {NOTES} notes"] = _summary(_frames(library, SCROLL))
        rows[f"search in {NOTES} notes, from the query to the numbers"] = _summary(
            [_search(site, i) for i in range(30)]
        )
        rows["an edit, and the page's data read anew"] = _summary([_edit(site, i + 1) for i in range(5)])
    timing.store("site", rows)


def _summary(seconds: list[float], **more: float) -> dict[str, Any]:
    found = {"seconds": statistics.median(seconds), "worst": max(seconds), "n": len(seconds), **more}
    return {**found, "held": found["seconds"] <= more["limit"]} if "limit" in more else found


def _build(site: fakes.Site, out: Path) -> float:
    began = time.perf_counter()
    build(out, site)
    return time.perf_counter() - began


def _ready(page: Any, address: str) -> float:
    """From the request to the moment when the page's script has drawn and listens."""
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page.evaluate("(performance.getEntriesByName('dx-ready')[0]?.startTime ?? performance.now()) / 1000")


def _frames(page: Any, move: str) -> list[float]:
    return [ms / 1000 for ms in page.evaluate(FRAMES, move)]


def _search(site: fakes.Site, i: int) -> float:
    site.notes.items()
    began = time.perf_counter()
    site.notes.search(f"paper number {i * 37}")
    return time.perf_counter() - began


def _edit(site: fakes.Site, number: int) -> float:
    began = time.perf_counter()
    site.notes.change(number, {"text": "edited"})
    site.notes.states()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
