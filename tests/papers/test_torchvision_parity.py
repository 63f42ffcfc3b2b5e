"""Boxes, regions, pyramids and heads equal torchvision's, which is asked in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_equal_to_torchvision():
    """The same weights and boxes give torchvision's results and gradients; every check is named when it differs."""
    missing = _why_missing()
    if missing:
        pytest.skip(missing)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    checks = Path(__file__).with_name("torchvision_checks.py")
    ran = subprocess.run([sys.executable, str(checks)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("equal ") == 12, ran.stdout


def test_torchvision_stays_out_of_this_process():
    """Its presence breaks packages that look for it, so nothing here may be able to import it."""
    import importlib.util

    assert importlib.util.find_spec("torchvision") is None


def _why_missing() -> str:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.peer_torchvision import missing

        return missing()
    finally:
        sys.path.remove(str(ROOT))
