import pytest
import torch

from deltax.errors import UserError
from deltax.papers.language.adaptation.lora import LoRA, lora
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import dyt
from deltax.papers.language.norm.rms_norm import rms_norm
from deltax.papers.optimization.normalization.layer_norm import layer_norm
from deltax.papers.optimization.optimizers.muon import muon
from deltax.recipe import from_json, to_json
from deltax.train.job import Job, task_of
from deltax.train.loop import build, train


@pytest.fixture
def tiny(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n\n" for i in range(2000)))
    recipe = gpt.put("model.dim", 12).put("model.stack.depth", 2).put("loop.batch", 4)
    return recipe.put("task.source", str(text)).put("task.context", 16).put("task.held_out", 500)


def bare(state):
    return {k.replace(".inner", ""): v for k, v in state.items() if not k.endswith((".a", ".b"))}


def test_the_base_starts_as_it_would_without(tiny):
    base, adapted = (build(recipe(), task_of(tiny), 5).state_dict() for recipe in (tiny, tiny + lora))
    assert len(adapted) == len(base) + 2 * 2 * 2
    assert bare(adapted).keys() == base.keys()
    assert all(torch.equal(bare(adapted)[k], v) for k, v in base.items())


@pytest.mark.parametrize("change", [None, muon], ids=["adamw", "muon"])
def test_a_trained_base_is_adapted_and_stays(tiny, change):
    base = train(Job(tiny, seed=1, steps=3)).model.state_dict()
    recipe = tiny + lora(rank=2) if change is None else tiny + lora(rank=2) + change
    run = train(Job(recipe, seed=1, steps=4), weights=base)
    state = run.model.state_dict()
    assert all(torch.equal(bare(state)[k], v) for k, v in base.items())
    adapters = [m for m in run.model.modules() if isinstance(m, LoRA)]
    assert len(adapters) == 4 and all(m.b.abs().max() > 0 for m in adapters)
    again = build(recipe(), task_of(tiny), 1)
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in state.items())


def test_an_adapted_run_that_stops_goes_on_exactly(tiny, tmp_path):
    job, stop = Job(tiny + lora(rank=2), seed=1, steps=6), {"at": 3}

    def die(progress):
        if progress.step == stop["at"]:
            raise KeyboardInterrupt

    whole = train(job).model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(job, save_to=tmp_path / "run", save_every=0, on_step=die)
    stop["at"] = None
    resumed = train(job, save_to=tmp_path / "run", on_step=die).model.state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def test_a_wrap_moves_what_others_wrote_and_erases_nothing():
    assert gpt + dyt + lora == gpt + lora + dyt
    assert gpt + muon + lora == gpt + lora + muon
    with pytest.raises(UserError, match="rms-norm erases all of layer-norm"):
        gpt + layer_norm(eps=1e-3) + lora + rms_norm
    assert [applied.paper.key for applied in (gpt + lora + muon).history] == ["gpt", "lora", "muon"]


def test_the_recipe_is_a_value(tiny):
    recipe = gpt + lora(rank=2)
    assert from_json(to_json(recipe)) == recipe
    assert recipe["model.inner.stack.block.mixer.project.query.rank"] == 2
    assert recipe.without(lora(rank=2)) == gpt
