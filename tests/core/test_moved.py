"""Names of modules from before they were in folders by family."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("deltax.papers.language.dyt", "deltax.papers.language.norm.dyt"),
        ("deltax.parts.context", "deltax.parts.attention.context"),
        ("deltax.tasks.text", "deltax.tasks.language.text"),
    ],
)
def test_an_old_name_is_the_same_module(old, new):
    sys.modules.pop(old, None)
    here = importlib.import_module(new)
    spec = here.__spec__
    with pytest.warns(DeprecationWarning, match=new):
        assert importlib.import_module(old) is here
    assert here.__spec__ is spec and here.__name__ == new


@pytest.mark.parametrize("name", ["deltax.papers.language.nowhere", "deltax.lab.dyt", "deltax.parts.model.dyt"])
def test_what_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
