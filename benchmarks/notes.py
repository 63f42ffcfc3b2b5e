"""Import of 10,000 entries in 2,000 files, and search over them: `python benchmarks/notes.py`.

Limits: import 10 s, search 50 ms. The files are made from a fixed seed, in the shapes that people keep notes in.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltax.library.importing import import_paths
from deltax.library.store import Library

FILES, EACH = 2000, 5
LIMITS = {"import_s": 10.0, "search_ms": 50.0}
OUT = Path(__file__).parent.parent / "evidence" / "benchmarks" / "notes.json"
WORDS = [
    "attention",
    "transformer",
    "diffusion",
    "kernel",
    "gradient",
    "softmax",
    "layer",
    "norm",
    "token",
    "sparse",
    "linear",
    "recurrent",
    "scaling",
    "law",
    "flow",
    "matching",
    "policy",
    "reward",
    "mask",
    "detector",
    "encoder",
    "decoder",
    "latent",
    "quantised",
    "low",
    "rank",
    "adapter",
    "cache",
    "memory",
    "stable",
    "optimizer",
]


def write_notes(folder: Path, rng: random.Random) -> None:
    """FILES files of EACH entries with nested notes, LaTeX, tasks, links and tags: a quarter each of four shapes."""

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    for f in range(FILES):
        numbers = [f * EACH + n for n in range(EACH)]
        entries = []
        for n in numbers:
            notes = [f"{words(8, 20)} $x_{{{n}}} = W_{{0}} + BA$" for _ in range(rng.randint(1, 5))]
            entries.append(
                (f"{words(3, 7).title()} {n}", f"https://arxiv.org/abs/2{n % 6}{1 + n % 12:02}.{n:05}", notes)
            )
        lines: list[str] = []
        if f % 4 == 0:
            lines = ["# Table", "", "| Paper title | Model name | Summary |", "|---|---|---|"]
            lines += [f"| {title} | M | {words(1, 2)} but with {words(2, 5)} |" for title, _, _ in entries]
        elif f % 4 == 2:
            lines = ["---", "dg-publish: true", "tags: [reading]", "---", f"## {words(1, 2)}"]
        for day, (title, url, notes) in enumerate(entries, 1):
            if f % 4 == 1:
                lines += [f"## [{title}]({url})", *notes, ""]
            elif f % 4 == 2:
                mark = rng.choice(["", " ⏫", " 🔽 📅 2025-03-01", " ✅ 2025-02-01 #tag"])
                lines += [f"- [{rng.choice(' x')}] [{title}]({url}){mark}", *(f"\t- {note}" for note in notes)]
            elif f % 4 == 3:
                lines += [f"### {day} March 2025", "", f"[{title}]({url})", "", *(f"- {note}" for note in notes), ""]
        path = folder / str(f % 40) / f"{f}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")


def measure(repeats: int) -> dict:
    imports, busy, again, searches = [], [], [], []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "vault")
            folder.mkdir()
            write_notes(folder, random.Random(0))
            with Library(Path(place, "library.sqlite")) as library:
                start, cpu = time.perf_counter(), time.process_time()
                report = import_paths(library, [folder])
                imports.append(time.perf_counter() - start)
                busy.append(time.process_time() - cpu)
                if (report.added, library.count()[0]) != (FILES * EACH, FILES * EACH):
                    raise SystemExit(f"{report.added} entries came in, not {FILES * EACH}")
                start = time.perf_counter()
                if import_paths(library, [folder]).unchanged_files != FILES:
                    raise SystemExit("importing again changed something")
                again.append(time.perf_counter() - start)
                rng = random.Random(repeat)
                for _ in range(100):
                    query = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
                    start = time.perf_counter()
                    found = library.search(query)
                    searches.append((time.perf_counter() - start) * 1000)
                    if not found:
                        raise SystemExit(f"nothing found for {query!r}")
    p95 = statistics.quantiles(searches, n=20)[-1]
    return {
        "import_s": {"median": statistics.median(imports), "worst": max(imports), "runs": len(imports)},
        "import_cpu_s": {"median": statistics.median(busy), "worst": max(busy), "runs": len(busy)},
        "import_again_s": {"median": statistics.median(again), "worst": max(again), "runs": len(again)},
        "search_ms": {"median": statistics.median(searches), "p95": p95, "worst": max(searches), "runs": len(searches)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-store", action="store_true", help="print only")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    measured = measure(args.repeats)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    held = {
        "import_s": measured["import_s"]["worst"] <= LIMITS["import_s"],
        "search_ms": measured["search_ms"]["worst"] <= LIMITS["search_ms"],
    }
    result = {
        "command": "python benchmarks/notes.py",
        "what": f"{FILES * EACH} entries in {FILES} files",
        "limits": LIMITS,
        "held": held,
        **measured,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "load_before": round(load, 2)},
        "python": platform.python_version(),
        "commit": commit,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if not args.no_store:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(text, encoding="utf-8")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
