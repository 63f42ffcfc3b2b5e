"""Take the README's screenshots again: `python docs/images/take.py PATH...` with the reading notes to show."""

import subprocess
import sys
import tempfile
from pathlib import Path

from deltax import catalog
from deltax.library.importing import import_paths
from deltax.library.store import Library
from deltax.site.notes import Notes
from deltax.site.pages import Site
from deltax.site.runs import Runs
from deltax.site.trees import Trees

HERE = Path(__file__).parent
SHOTS = {
    "genealogy": ("index.html#paper=gpt", 1440, 860),
    "paper": ("paper/dyt.html", 1440, 1240),
    "library": ("library.html", 1200, 860),
}


def main(paths: list[str]) -> None:
    sys.path.insert(0, str(HERE.parent.parent / "tests" / "site"))
    import browsers

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.sqlite"
        with Library(library) as opened:
            import_paths(opened, paths)
        papers = catalog.papers()
        trees = Trees(Path(folder) / "trees")
        trees.diffs(["dyt"])
        site = Site(papers=papers, notes=Notes(library, papers), runs=Runs(Path(folder) / "runs"), trees=trees)
        with browsers.serving(site) as home, browsers.browser() as browser:
            for name, (address, width, height) in SHOTS.items():
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
                page.goto(home + address)
                if name == "library":
                    page.select_option("#order", "date")
                page.wait_for_timeout(700)
                page.screenshot(path=HERE / f"{name}.png")
    subprocess.run(["ls", "-l", *map(str, HERE.glob("*.png"))], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
