import pytest
import torch

from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.optimizers.muon import Muon, muon, muon_and_adamw, newton_schulz
from deltax.parts.training.roles import by_role, tag
from deltax.train.job import Job
from deltax.train.loop import train


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n\n" for i in range(2000)))
    recipe = gpt.put("model.dim", 12).put("model.stack.depth", 1).put("loop.batch", 4)
    return recipe.put("task.source", str(text)).put("task.context", 16).put("task.held_out", 500) + muon


def test_a_run_that_dies_goes_on_exactly(recipe, tmp_path):
    class Killed(Exception):
        pass

    def die(progress):
        if progress.step == 5:
            raise Killed

    job = Job(recipe, seed=3, steps=9)
    whole = train(job)
    with pytest.raises(Killed):
        train(job, save_to=tmp_path / "run", save_every=0, on_step=die)
    rest: list[int] = []
    resumed = train(job, save_to=tmp_path / "run", on_step=lambda progress: rest.append(progress.step))
    assert rest == [5, 6, 7, 8, 9]
    assert [tuple(pair) for pair in resumed.progress.losses] == whole.progress.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_schedule_and_the_rate_reach_both_halves(recipe):
    model = recipe().build({"vocab": 256, "context": 16})
    optimizer = muon_and_adamw(model)
    rates = {group["lr"]: group["params"] for group in optimizer.param_groups}
    assert set(rates) == {0.02, 3e-3}
    assert {id(p) for p in rates[0.02]} == {id(p) for p in by_role(model)["matrix"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_recipe_keeps_adamws_rate_for_the_rest():
    recipe = gpt.put("optimizer.lr", 1e-3) + muon(spectral_lr=0.05)
    assert (recipe["optimizer.lr"], recipe["optimizer.spectral_lr"]) == (1e-3, 0.05)


def test_filters_are_flattened_and_parameters_without_gradient_stay():
    torch.manual_seed(0)
    filters, still = torch.nn.Parameter(torch.randn(6, 2, 3, 3)), torch.nn.Parameter(torch.randn(3, 3))
    first = filters.detach().clone()
    filters.grad = torch.randn_like(filters)
    optimizer = Muon([filters, still], lr=0.1)
    optimizer.step()
    move = (first - filters.detach()).flatten(1) / 0.1
    expected = newton_schulz((filters.grad * (1 - 0.95**2)).flatten(1))
    torch.testing.assert_close(move, expected, rtol=1e-4, atol=1e-5)
    assert set(optimizer.state) == {filters}


def test_a_model_without_matrices_is_adamws():
    model = torch.nn.LayerNorm(5)
    tag(model.weight, "vector")
    assert all(group["betas"] for group in muon_and_adamw(model).param_groups)
