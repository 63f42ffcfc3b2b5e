"""How well lists and pages are read, against a truth made by hand: `python -m benchmarks notes-quality [FOLDER]`.

FOLDER holds notes and a truth.json: {file: {"entries": [{"title", "ids"}], "kept": [texts], "part": name}}. An entry is
found when one that was read has its title or one of its identifiers; `invented` are those read that are in no truth;
`kept` are texts that must stand in an entry or in a remark.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from deltax.library import formats
from deltax.library.files import BIBLIOGRAPHIES, load
from deltax.library.identifiers import normal_title, parse
from deltax.library.model import Entry, Reading
from deltax.library.readers import read

OWN = Path(__file__).parent.parent / "tests" / "library" / "lists"
COUNTS = ("entries", "found", "titles", "ids wanted", "ids", "invented", "kept wanted", "kept")
GOALS = {"found": 0.98, "titles": 0.95, "ids": 0.95, "invented": 0.01}


def reading_of(path: Path) -> Reading:
    text = load(path)
    if path.suffix.lower() in BIBLIOGRAPHIES:
        return formats.read_file(str(path), "\n".join(text.lines))
    return read(str(path), text.lines)


def score(wanted: list[dict], reading: Reading, kept: Iterable[str] = ()) -> dict[str, int]:
    """COUNTS of one file."""
    left: list[Entry] = list(reading.entries)
    found = titles = ids = 0
    for truth in wanted:
        title, keys = normal_title(truth["title"]), {_key(i) for i in truth.get("ids", ())}
        same = [e for e in left if normal_title(e.title) == title]
        same = same or [e for e in left if keys & {i.key for i in e.reference.ids}]
        if not same:
            continue
        best = max(same, key=lambda e: len(keys & {i.key for i in e.reference.ids}))
        left.remove(best)
        found += 1
        titles += normal_title(best.title) == title
        ids += bool(keys) and keys <= {i.key for i in best.reference.ids}
    known = {normal_title(truth["title"]) for truth in wanted}
    texts = [f"{e.title} {e.reference.venue} {e.text} {e.origin.raw}" for e in reading.entries]
    texts += [remark.text for remark in reading.remarks]
    kept = list(kept)
    return {
        "entries": len(wanted),
        "found": found,
        "titles": titles,
        "ids wanted": sum(bool(truth.get("ids")) for truth in wanted),
        "ids": ids,
        "invented": sum(not e.origin.within and normal_title(e.title) not in known for e in left),
        "kept wanted": len(kept),
        "kept": sum(any(" ".join(words.split()) in " ".join(text.split()) for text in texts) for words in kept),
    }


def _key(text: str) -> str:
    found = parse(text)
    return found.key if found else text


def measure(folder: Path) -> dict[str, dict]:
    """{file: its counts and its part}."""
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    return {
        name: {**score(t["entries"], reading_of(folder / name), t.get("kept", ())), "part": t.get("part", "all")}
        for name, t in truth.items()
    }


def total(rows: Iterable[dict]) -> dict[str, int]:
    rows = list(rows)
    return {name: sum(row[name] for row in rows) for name in COUNTS}


def shares(row: dict[str, int]) -> dict[str, float]:
    return {
        "found": row["found"] / max(row["entries"], 1),
        "titles": row["titles"] / max(row["entries"], 1),
        "ids": row["ids"] / max(row["ids wanted"], 1),
        "invented": row["invented"] / max(row["entries"], 1),
    }


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OWN
    measured = measure(folder)
    parts = list(dict.fromkeys(row["part"] for row in measured.values()))
    print(f"{'':36}" + "".join(f"{name:>12}" for name in COUNTS))
    for part in parts:
        rows = {name: row for name, row in measured.items() if row["part"] == part}
        for name, row in rows.items():
            print(f"{name:36}" + "".join(f"{row[key]:>12}" for key in COUNTS))
        said = ", ".join(f"{name} {value:.1%}" for name, value in shares(total(rows.values())).items())
        print(f"{part}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
