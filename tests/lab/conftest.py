"""Settings and fixtures of the lab's tests."""

import importlib

import numpy as np
import pytest
from fake_runs import STEPS, Truth, World

from deltax import recipe
from deltax.lab.store import Store


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["tree", "part", "slot", "norm", "paper", "claim", "pair", "rate"]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(text):
    """A recipe of a few thousand parameters, and what the words after it make of it."""

    def make(words: str = "gpt"):
        settings = ["model.dim=8", "model.stack.depth=1", "model.stack.block.mixer.heads=2"]
        settings += ["task.context=16", "loop.batch=4", f"loop.steps={6 * STEPS}", "task.held_out=512"]
        return recipe(words, [*settings, f"task.source={text}"])

    return make


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def world(monkeypatch):
    plan = importlib.import_module("deltax.lab.plan")
    monkeypatch.setattr(plan, "calibrate", lambda x: plan.Calibration(0.01, 0.01, 0.0))

    def make(truths: dict[str, Truth], **settings) -> World:
        made = World({"gpt": Truth(), **truths}, **settings)
        monkeypatch.setattr(importlib.import_module("deltax.lab.compare"), "execute", made.execute)
        return made

    return make
