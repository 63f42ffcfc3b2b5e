"""Meshes of gloo processes lose as one process does; a group that breaks says so, soon, on every process."""

import pytest
import torch

from deltax import recipe
from deltax.train import checkpoint
from deltax.train.job import Job
from deltax.train.launch import launch
from deltax.train.loop import train
from deltax.train.mesh import Mesh

TEXT = "".join(f"{i} is half of {2 * i}, and a third of {3 * i}.\n\n" for i in range(2000))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text(TEXT)

    def make(expression="gpt", *settings, **job):
        sizes = ["model.dim=12", "model.stack.depth=2", "task.context=16", "task.held_out=512", f"task.source={path}"]
        sizes.append("model.block.mixer.heads=2") if False else None
        return Job(recipe(expression, [*sizes, *settings]), **{"steps": 6, **job})

    return make


def losses(job, path):
    outcome = train(job, save_to=path, save_every=0.0)
    return [loss for _, loss in outcome.progress.losses], outcome.evaluation.score


HEADS = "model.stack.block.mixer.heads=4"


@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2,tp=2"])
def test_losses(tiny, tmp_path, mesh):
    job = tiny("gpt", HEADS)
    layout = Mesh.parse(mesh)
    found = launch(layout.size, losses, job, tmp_path / "run.safetensors", layout=layout, patience=30)
    one = losses(job, tmp_path / "one.safetensors")
    for each in found:
        torch.testing.assert_close(torch.tensor(each[0]), torch.tensor(one[0]), rtol=1e-4, atol=1e-4)
        assert each[1] == pytest.approx(one[1], rel=1e-4)
    a, b = (checkpoint.load(tmp_path / f"{name}.safetensors")[0] for name in ("run", "one"))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
