"""Names of before: told the new one where a user writes them, understood where a store holds them."""

import pytest

from deltax import UserError, address, recipe
from deltax.errors import RENAMED
from deltax.papers.language.models.gpt import gpt
from deltax.recipe import from_json, takes, to_json
from deltax.train.job import Job


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda: recipe("gpt+adamw(rate=0.1)"), "adamw takes no 'rate'; it is called 'lr' now"),
        (
            lambda: recipe("gpt+muon(spectral_rate=0.1)"),
            "muon takes no 'spectral_rate'; it is called 'spectral_lr' now",
        ),
        (lambda: recipe("gpt", ["optimizer.rate=0.1"]), "'optimizer.rate' to set; it is called 'optimizer.lr' now"),
        (lambda: recipe("gpt", ["loop.clip=1.0"]), "it is called 'loop.max_grad_norm' now"),
        (lambda: recipe("gpt+diloco(outer_rate=0.1)"), "it is called 'outer_lr' now"),
        (lambda: recipe("gpt+diloco", ["optimizer.inner.decay=0"]), "it is called 'optimizer.inner.weight_decay' now"),
    ],
)
def test_an_old_name_is_told_the_new_one(write, told):
    with pytest.raises(UserError) as error:
        write()
    assert told in str(error.value)


@pytest.mark.parametrize("option", ["--rate", "--lr"])
def test_an_old_option_is_told_the_new_one(option, capsys):
    from deltax.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["train", "gpt", option, "2"])
    assert f"there is no {option}; it is called '--lr-scale' now" in capsys.readouterr().err


def test_no_new_name_is_an_old_one():
    assert not set(RENAMED) & set(RENAMED.values())


@pytest.mark.parametrize("where", address.ARGUMENTS)
def test_renamed_arguments_are_those_that_the_maker_takes(where):
    names = takes(address.find(where))
    for old, new in address.ARGUMENTS[where].items():
        assert new in names and old not in names


@pytest.mark.parametrize("old", address.MOVED)
def test_a_moved_part_is_found_by_its_old_address(old):
    address.find(old)


def _before(data):
    """A stored tree as it was before the renaming."""
    if isinstance(data, list):
        return [_before(item) for item in data]
    if not isinstance(data, dict):
        return data
    names = {new: old for old, new in address.ARGUMENTS.get(data["make"], {}).items()}
    makes = {new: old for old, new in address.MOVED.items()}
    return {
        "make": makes.get(data["make"], data["make"]),
        "given": {names.get(k, k): _before(v) for k, v in data["given"].items()},
    }


@pytest.mark.parametrize(
    "expression",
    [
        "gpt+adamw(lr=0.2,weight_decay=0.3)",
        "gpt+muon(spectral_lr=0.3)",
        "gpt+diloco(outer_lr=0.2)",
        "gpt+async-local-sgd(outer_lr=0.2)",
        "gpt+async-nesterov-pp",
        "detr",
        "maskformer",
        "mask2former",
        "simclr+moco",
        "vit+mae",
    ],
)
def test_a_recipe_stored_under_the_old_names_opens(expression):
    tree = recipe(expression)
    stored = to_json(tree)
    assert _before(stored) != stored and from_json(_before(stored)) == tree


def test_a_job_stored_under_the_old_names_opens():
    job = Job(gpt, seed=3, steps=5, lr_scale=2.0)
    stored = job.to_json()
    stored["rate"] = stored.pop("lr_scale")
    assert Job.from_json(stored) == job
