"""Addresses of stored parts: what they reach, and that they outlive a move."""

import json

import pytest
import torch
from torch import nn

from deltax import UserError, address, catalog, part
from deltax.expression import load
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT
from deltax.recipe import Part, from_json, to_json
from deltax.train.job import Job


def trees():
    """Every recipe, and every delta on the recipe that it is shown on."""
    papers = catalog.papers()
    for key, record in papers.items():
        if record.kind == "recipe":
            yield key, load(key)
        elif record.kind == "delta":
            first, *changes = catalog.shown_on(record, papers).split("+")
            tree = load(first)
            for change in [*changes, key]:
                if change not in tree.title.split("+"):
                    try:
                        tree = tree + load(change)
                    except UserError:
                        break
            yield key, tree


def test_every_recipe_opens_again_by_addresses_without_folders():
    seen = set()
    for key, tree in trees():
        stored = json.dumps(to_json(tree))
        assert from_json(json.loads(stored)) == tree, key
        seen |= {v.target for _, v in tree.walk() if isinstance(v, Part)}
    for make in seen:
        area, _, name = address.address(make).partition(":")
        assert area.count(".") == 1 and name == make.__qualname__
        assert address.find(address.address(make)) is make
        assert address.find(f"{make.__module__}:{name}") is make, "the address as it was before"


@pytest.mark.parametrize("area", address.AREAS)
def test_a_stem_is_one_file_of_its_area(area):
    assert not {stem: where for stem, where in address.modules(area).items() if len(where) > 1}


@pytest.mark.parametrize(
    "text",
    [
        "os:system",
        "builtins:print",
        "deltax.cli:main",
        "deltax.lab.store:Store",
        "deltax.recipe:part",
        "deltax.papers.language.dyt:torch.save",  # through an import
        "papers.dyt:torch.nn.Linear",
        "papers.vitok:ROOM",  # a number
        "papers.dyt:part",  # imported from the core
        "papers.rope:gpt",  # another paper's recipe
        "papers.dyt:dyt",  # a paper is no part
        "papers.dyt:DyT.forward.__globals__",
        "papers.dyt:DyT.forward",
        "papers.shardcast:Http",  # a server: it opens a socket when it is made
        "tasks.masks:math.prod",
        "parts.mlp:nn.functional.relu",
        "torch.nn:functional.torch.save",
        "torch.nn.functional:torch",
        "torch.nn.modules.module:torch.save",
        "torch.nn:DataParallel",
        "torch.nn.init:normal_",
        "papers.../tasks/masks:math",
        "papers.*:DyT",
        "papers.__init__:x",
        "papers.nowhere:DyT",
        "papers.dyt:Dyt",
        "papers.dyt",
        "",
        None,
        3,
    ],
)
def test_an_address_reaches_only_parts(text):
    with pytest.raises(UserError) as error:
        from_json({"make": text, "given": {}})
    assert "\n" not in str(error.value)


def test_what_a_module_imported_is_never_called(monkeypatch):
    called = []
    harmless = lambda *_, **__: called.append(1)
    monkeypatch.setattr("deltax.papers.language.norm.dyt.harmless", harmless, raising=False)
    with pytest.raises(UserError, match="may name only what deltax defines"):
        from_json({"make": "deltax.papers.language.dyt:harmless", "given": {}})
    stored = Job(gpt).to_json()
    stored["recipe"]["given"]["schedule"] = {"make": "papers.dyt:harmless", "given": {}}
    with pytest.raises(UserError, match="may name only what deltax defines"):
        Job.from_json(stored)
    assert not called


def test_torch_is_reached_by_its_modules_and_activations():
    for make in (nn.LayerNorm, nn.BatchNorm2d, nn.GELU, nn.functional.relu):
        assert from_json(json.loads(json.dumps(to_json(part(make))))).target is make
    assert address.find("torch.nn.functional:gelu") is nn.functional.gelu
    assert all(callable(getattr(nn.functional, name)) for name in address.FUNCTIONS)
    with pytest.raises(UserError, match="wrap it in a function"):
        part(torch.tanh)


def test_a_moved_definition_is_found(monkeypatch):
    monkeypatch.setitem(address.MOVED, "parts.optimizers:Tanh", "papers.squash:Squash")
    monkeypatch.setitem(address.MOVED, "papers.squash:Squash", "papers.dyt:DyT")
    assert address.find("deltax.parts.training.optimizers:Tanh") is DyT
    assert address.find("deltax.papers.norm.family.dyt:DyT") is DyT


@pytest.mark.parametrize(
    ("address_", "says"),
    [("papers.dtt:DyT", "did you mean 'dyt'"), ("papers.dyt:DyTT", "did you mean 'DyT'")],
)
def test_a_missing_definition_is_one_sentence(address_, says):
    with pytest.raises(UserError, match=f"{says}.*another version of deltax"):
        address.find(address_)


def test_what_was_moved_is_there():
    for new in address.MOVED.values():
        assert address.address(address.find(new)) == new


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "load"},
        {"start": "../../notes"},
        {"steps": "9"},
        {"seed": 1.5},
        {"recipe": []},
        {"recipe": to_json(part(DyT))},
        {"recipe": {"make": "papers.dyt:DyT"}},
        {"recipe": {"make": "papers.dyt:DyT", "given": []}},
        {"engine": "x"},
    ],
)
def test_a_stored_job_holds_what_jobs_hold(change):
    with pytest.raises(UserError) as error:
        Job.from_json({**Job(gpt).to_json(), **change})
    assert "\n" not in str(error.value)
    for data in (None, [], "job", {}):
        with pytest.raises(UserError, match="a stored job is an object"):
            Job.from_json(data)
