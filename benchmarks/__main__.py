"""`python -m benchmarks [NAME ...]`: every benchmark, or those named; results go to `evidence/benchmarks/`."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if "def main" in p.read_text() and p.stem != "__main__")

given, sys.argv[1:] = sys.argv[1:], []  # names are for this file; a benchmark reads the paths that are left
names = [word.replace("-", "_") for word in given if not Path(word).exists()]
sys.argv[1:] = [word for word in given if Path(word).exists()]
for name in names or NAMES:
    if name not in NAMES:
        sys.exit(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    importlib.import_module(f"benchmarks.{name}").main()
