"""A run is named by the code that trains it, and by no other code."""

import pytest

from deltax.expression import recipe
from deltax.train import code, job
from deltax.train.job import Job

GPT_DYT = "gpt+dyt"


@pytest.fixture
def edited(monkeypatch):
    """The id of a run of gpt+dyt as it would be after one edit: in files of this name, `old` becomes `new`."""
    read = code.source

    def run_id(file: str, old: str, new: str) -> str:
        seen = []

        def source(path):
            text = read(path)
            if path.as_posix().endswith(file):
                seen.append(old in text)
                text = text.replace(old, new)
            return text

        monkeypatch.setattr(code, "source", source)
        code.outline_of.cache_clear()
        job.code_version.cache_clear()
        try:
            found = Job(recipe(GPT_DYT)).id
        finally:
            monkeypatch.setattr(code, "source", read)
            code.outline_of.cache_clear()
            job.code_version.cache_clear()
        assert all(seen), f"{file} holds no {old!r}"
        return found

    return run_id


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("/dyt.py", "torch.tanh(", "torch.sin("),
        ("/dyt.py", "torch.ones(dim)", "torch.zeros(dim)"),
        ("/parts/model/mlp.py", "self.down(", "-self.down("),
        ("/kernels/mlp.py", "def forward", "def forwards"),
        ("/train/loop.py", "progress.step += 1", "progress.step += 2"),
        ("/softmax_attention.py", "softmax(", "sigmoid("),
    ],
)
def test_editing_what_trains_names_another_run(edited, file, old, new):
    assert edited(file, old, new) != Job(recipe(GPT_DYT)).id


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("/dyt.py", '"""Transformers', '"""Other words'),
        ("/dyt.py", "class DyT", "# A comment.\nclass DyT"),
        ("/dyt.py", "x: Features", "x: object"),
        ("/dyt.py", "@paper(", "UNUSED = 1\n\n\n@paper("),
        ("/claims/language/norm/dyt.py", "assert", "assert True or"),
        ("/papers/vision/backbones/swin.py", "class ", "class Other"),
        ("/papers/language/adaptation/lora.py", "self.", "self.other."),
        ("/weights/language/models/gpt.py", "state", "stated"),
        ("/lab/compare.py", "def ", "def other_"),
    ],
)
def test_editing_anything_else_does_not(edited, file, old, new):
    assert edited(file, old, new) == Job(recipe(GPT_DYT)).id


def reached(monkeypatch, sources, *names):
    monkeypatch.setattr(code, "_file", lambda module: module if module in sources else None)
    monkeypatch.setattr(code, "source", sources.get)
    code.outline_of.cache_clear()
    try:
        return set(code.reached([code.Name(*name.split(":")) for name in names]))
    finally:
        code.outline_of.cache_clear()


def test_names_are_followed_through_modules(monkeypatch):
    sources = {
        "deltax.a": "from deltax import b\nfrom deltax.c import f as g\nX = b.y\ndef h(): return g() + X\n"
        "def idle(): b.z",
        "deltax.b": "y = 1\nz = unused = 2",
        "deltax.c": "import torch\ndef f():\n    from deltax.d import late\n    return late",
        "deltax.d": "late = 3\nprint('at import')",
    }
    found = reached(monkeypatch, sources, "deltax.a:h")
    names = {name for name in found if not name.endswith(":")}
    assert names == {"deltax.a:h", "deltax.a:X", "deltax.b:y", "deltax.c:f", "deltax.d:late"}


def test_a_module_handed_on_whole_is_reached_whole(monkeypatch):
    sources = {"deltax.a": "from deltax import b\ndef h(): return vars(b)", "deltax.b": "y = 1\nz = 2"}
    assert "deltax.b:*" in reached(monkeypatch, sources, "deltax.a:h")
