"""`python made_trees.py FOLDER`: `deltax.site.trees` where the made-up papers of a folder stand among the real ones."""

import importlib
import sys
from pathlib import Path

from deltax import catalog
from deltax.site import trees


def main(folder: Path) -> None:
    import deltax.papers

    deltax.papers.__path__.append(str(folder))
    for field in folder.iterdir():
        package = importlib.import_module(f"deltax.papers.{field.name}")
        if str(field) not in package.__path__:
            package.__path__.append(str(field))
    every = catalog.papers() | {r.key: r for r in map(catalog.read, sorted(folder.glob("*/*.py")))}
    catalog.papers = lambda: every
    trees.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
