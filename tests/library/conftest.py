"""The five files that the issue names lie beside a checkout (`shared/reading-notes`), never in it."""

import os
from pathlib import Path

import pytest
import yaml

EXPECTED = yaml.safe_load((Path(__file__).parent / "reading_notes.yaml").read_text(encoding="utf-8"))


def reading_notes() -> Path | None:
    given = os.environ.get("DELTAX_READING_NOTES")
    places = [Path(given)] if given else [p / "shared" / "reading-notes" for p in Path(__file__).resolve().parents]
    return next((place for place in places if place.is_dir()), None)


@pytest.fixture
def five() -> Path:
    place = reading_notes()
    if place is None:
        pytest.skip("shared/reading-notes is not beside this checkout: set DELTAX_READING_NOTES")
    return place


@pytest.fixture(params=sorted(EXPECTED))
def one_of_five(request, five) -> tuple[Path, dict]:
    return five / request.param, EXPECTED[request.param]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Every test has a library of its own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DELTAX_HOME", str(folder))
    return folder
