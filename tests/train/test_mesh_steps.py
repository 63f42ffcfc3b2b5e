"""What the processes of a mesh agree on from step to step."""

import pytest
from all_meshes import job

from deltax import UserError
from deltax.train import loop, mesh
from deltax.train.launch import launch
from deltax.train.mesh import Mesh

SMALL = ["model.dim=12", "model.stack.depth=1", "model.stack.block.mixer.heads=2"]


def _messages(job, path):
    """How often the processes asked the first one for a number."""
    asked, of_first = [], mesh.of_first
    mesh.of_first = lambda number: asked.append(number) or of_first(number)
    try:
        loop.train(job, save_to=path, save_every=3600.0)
    finally:
        mesh.of_first = of_first
    return len(asked)


def test_processes_ask_rarely_whether_to_save(tmp_path):
    this = job("gpt", *SMALL, steps=100)
    one, two = launch(2, _messages, this, tmp_path / "run.safetensors", layout=Mesh(dp=2), patience=60)
    assert one == two < 10


def _unfreeze(job):
    build, models = loop.build, []

    def frozen(*given):
        models.append(build(*given))
        models[0].norm.requires_grad_(False)
        return models[0]

    loop.build = frozen
    try:
        loop.train(job, on_step=lambda progress: models[0].norm.requires_grad_(True))
    finally:
        loop.build = build


@pytest.mark.parametrize("axes", ["dp=2", "fsdp=2"])
def test_a_parameter_that_is_unfrozen_on_the_way_is_refused(axes):
    with pytest.raises(UserError, match=rf"norm\.\w+ was frozen when the run began, and mesh {axes} sums no gradient"):
        launch(2, _unfreeze, job("gpt", *SMALL), layout=Mesh.parse(axes), patience=60)
