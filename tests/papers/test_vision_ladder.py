import math

import pytest
import torch
from torch import nn

from deltax import UserError, catalog, part
from deltax.claims.optimization.losses.entropy_minimisation import _error, _gaussians, _logistic
from deltax.expression import recipe
from deltax.papers.generative.ddpm import ddpm
from deltax.papers.optimization.losses.dropout import Dropout, Thinned
from deltax.papers.optimization.normalization.batch_norm import BatchNorm
from deltax.papers.vision.backbones.lecun1989_rerun import RUNGS, STOPS
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.papers.vision.backbones.u_net import Conditioned, UNet
from deltax.papers.vision.self_supervised.moco import Momentum
from deltax.papers.vision.self_supervised.simclr import simclr
from deltax.papers.vision.training.model_soup import soup, uniform
from deltax.parts.model.convolution import GroupNorm
from deltax.parts.model.perceptron import Perceptron, classifier
from deltax.parts.training.views import jittered
from deltax.tasks.images.digits import Digits
from deltax.train.job import Job, task_of
from deltax.train.loop import build, train


def test_the_ladder_is_written_at_the_shell(unchecked):
    top = recipe("lecun1989-rerun(rung=5)")
    assert top == recipe("lenet-1989+cross-entropy+adamw(rate=3e-4)", ["loop.steps=13800"]).fill(
        "schedule", top["schedule"]
    )
    assert max(STOPS.values()) == len(RUNGS) == 11
    for bad in (-1, 12, 2.0):
        with pytest.raises(UserError, match="rungs 0 to 11"):
            recipe(f"lecun1989-rerun(rung={bad})")


@pytest.mark.parametrize("rung", range(12))
def test_every_rung_trains(rung):
    outcome = train(Job(recipe(f"lecun1989-rerun(rung={rung})"), steps=3))
    assert outcome.evaluation is not None and 0 <= outcome.evaluation.score <= 100


def test_rungs_share_their_start():
    models = [build(recipe(f"lecun1989-rerun(rung={r})")(), _Facts, 7).state_dict() for r in (0, 10)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_few_digits_are_learned():
    outcome = train(Job(lenet_1989.put("task.images", 4), steps=60 * 4))
    assert outcome.evaluation.metrics["training error"] == 0


def test_cross_entropy_replaces_the_objective_and_no_more():
    assert recipe("lenet-1989+cross-entropy")["objective"] == recipe("resnet")["objective"]
    with pytest.raises(UserError, match="changes nothing"):
        recipe("resnet+cross-entropy")
    assert recipe("resnet+cross-entropy(smoothing=0.1)")["objective.smoothing"] == 0.1


def test_dropout_finds_its_place():
    assert recipe("lenet-1989+dropout")["model.dropout"] == part(Dropout)
    tree = recipe("gpt+dropout(p=0.1)")
    assert tree["model.stack.block.mixer"].make is Thinned
    thinned, whole = (build(r.put("model.dim", 48)(), task_of(r), 0) for r in (tree, recipe("gpt")))
    tokens = torch.arange(10).view(2, 5)
    assert not torch.equal(thinned(tokens), thinned(tokens))
    assert torch.equal(thinned.eval()(tokens), whole.eval()(tokens))
    with pytest.raises(UserError, match="share p"):
        Dropout(p=1.0)


@pytest.mark.parametrize("change", ["batch-norm", "cross-entropy", "dropout", "shift-augmentation"])
def test_what_the_page_tells_to_type_works(change):
    if change != "batch-norm":  # whose X no file is
        assert catalog.use(catalog.find(change), catalog.papers()) == f"dx compare lenet-1989 lenet-1989+{change}"
    assert train(Job(recipe(f"lenet-1989+{change}"), steps=2)).evaluation is not None


def test_resnet_is_batch_normed():
    with pytest.raises(UserError, match="changes nothing"):
        recipe("resnet+batch-norm")
    model = recipe("resnet")().build({"channels": 1, "classes": 10})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, BatchNorm) for m in model.modules()) == 9
    with pytest.raises(UserError, match=r"loop\.batch"):
        train(Job(classifier(part(Perceptron, map_norm=BatchNorm), part(Digits), batch=1), steps=1))


def test_a_mlp_learns_digits_with_and_without_norm():
    for norm in (None, BatchNorm):
        model = part(Perceptron, widths=(32,), **({"map_norm": norm} if norm else {}))
        found = train(Job(classifier(model, part(Digits), steps=80, rate=5e-3), steps=80)).evaluation
        assert found.metrics["accuracy"] > 0.6


def test_being_sure_helps_where_there_is_a_gap():
    plain, sure = (_error(_logistic(*_gaussians(0), weight)) for weight in (0.0, 1.0))
    assert plain > 5 and sure < plain


def test_a_linear_error_is_what_is_counted():
    points, labels, _ = _gaussians(3)
    w = _logistic(points, labels, points, 0.0)
    torch.manual_seed(0)
    signs = 2.0 * (torch.arange(200_000) % 2) - 1
    draws = torch.randn(200_000, 50, dtype=torch.float64) + signs[:, None] * 1.6449 / 50**0.5
    wrong = ((draws @ w[:-1] + w[-1]) * signs < 0).double().mean().item()
    assert 100 * wrong == pytest.approx(_error(w), abs=0.3)


def test_views_are_of_the_same_image():
    torch.manual_seed(0)
    images = torch.randn(5, 2, 9, 9)
    still = jittered(images, turn=0, move=0, zoom=0, noise=0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)
    assert not torch.equal(jittered(images), jittered(images))


def test_moco_starts_as_simclr_does():
    plain, moved = simclr, recipe("simclr+moco")
    ours, theirs = (build(r(), _Facts, 3) for r in (moved, plain))
    assert isinstance(ours, Momentum)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.inner.state_dict()[name], value)
        assert torch.equal(ours.slow.state_dict()[name], value)
    torch.testing.assert_close(ours.queue.norm(dim=-1), torch.ones(len(ours.queue)))


@pytest.mark.parametrize("of", ["simclr", "simclr+moco(length=32)", "u-net"])
def test_short_runs_go_well(of):
    losses = [loss for _, loss in train(Job(recipe(of).put("loop.batch", 16), steps=6)).progress.losses]
    again = [loss for _, loss in train(Job(recipe(of).put("loop.batch", 16), steps=6)).progress.losses]
    assert losses == again and all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 6


def test_a_resumed_moco_run_goes_on(tmp_path):
    tree = recipe("simclr+moco(length=32)").put("loop.batch", 8)
    whole = train(Job(tree, steps=4)).model.state_dict()
    from deltax.train.loop import Stop

    def stop(progress):
        if progress.step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(Job(tree, steps=4), save_to=tmp_path / "run", on_step=stop)
    resumed = train(Job(tree, steps=4), save_to=tmp_path / "run").model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_u_net_is_a_body_for_diffusion():
    tree = ddpm.fill("body", UNet, level=part(Conditioned), widths=(8, 16)).put("loop.batch", 4)
    outcome = train(Job(tree, steps=2))
    assert outcome.evaluation is not None and outcome.evaluation.score > 0


def test_group_norm_takes_any_width():
    for channels in (1, 6, 7, 16):
        x = torch.randn(2, channels, 3, 5)
        assert GroupNorm(channels, groups=4)(x).shape == x.shape


def test_soups_say_what_is_wrong():
    with pytest.raises(UserError, match="at least one"):
        uniform([])
    with pytest.raises(UserError, match="differ"):
        soup([{"w": torch.ones(2)}, {"w": torch.ones(3)}], lambda state: state["w"].sum().item())


class _Facts:
    facts = {"channels": 1, "size": 16, "classes": 10, "vocab": 16, "context": 8}  # noqa: RUF012
