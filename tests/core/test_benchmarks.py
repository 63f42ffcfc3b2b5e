"""`python -m benchmarks NAME ...` runs what it names, whether or not a benchmark reads arguments of its own."""

import runpy
import sys

import benchmarks.notes
import benchmarks.site


def test_names_are_not_arguments_of_the_benchmarks(monkeypatch):
    ran = []
    monkeypatch.setattr(benchmarks.notes, "main", lambda: ran.append(("notes", sys.argv[1:])))
    monkeypatch.setattr(benchmarks.site, "main", lambda: ran.append(("site", sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "notes", "site"])
    runpy.run_module("benchmarks")
    assert ran == [("notes", []), ("site", [])]
