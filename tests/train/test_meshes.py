"""Meshes of gloo processes lose as one process does; a group that breaks says so, soon, on every process."""

import contextlib
import dataclasses
import os
import signal
import socket
import time

import pytest
import torch

from deltax import UserError, recipe
from deltax.train import checkpoint, mesh
from deltax.train.job import Job
from deltax.train.launch import launch, tell
from deltax.train.loop import Stop, train
from deltax.train.mesh import Lost, Mesh

TEXT = "".join(f"{i} is half of {2 * i}, and a third of {3 * i}.\n\n" for i in range(2000))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text(TEXT)
    sizes = ["model.dim=12", "model.stack.depth=2", "model.stack.block.mixer.heads=2", "loop.batch=8"]
    data = ["task.context=16", "task.held_out=128", f"task.source={path}"]
    return lambda expression="gpt", *settings: Job(recipe(expression, [*sizes, *data, *settings]), steps=3)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """What one process comes to, and its checkpoint."""
    path = tmp_path_factory.mktemp("alone") / "run.safetensors"
    return run(tiny("gpt+alibi"), path), checkpoint.load(path)[0]


def run(job, path):
    """Train half, go on from the checkpoint, leave another; losses, score and how many weights this process holds."""
    with contextlib.suppress(Stop):
        train(job, save_to=path, on_step=_stop_half_way)
    outcome = train(job, save_to=path, save_every=0.0)
    here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in outcome.model.parameters())
    return [loss for _, loss in outcome.progress.losses], outcome.evaluation.score, here


def _stop_half_way(progress):
    if progress.step == 2:
        raise Stop


def _over_gloo(job, path):
    assert mesh._shared is not None, "else dp=2 is this too"
    mesh._shared = None
    return run(job, path)


@pytest.mark.parametrize("axes", ["dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2,tp=2", "pp=2,fsdp=2", "pp=2,dp=2", "gloo"])
def test_a_mesh_loses_as_one_process(tiny, alone, tmp_path, axes):
    """And it holds less of the model where it says so, and leaves the checkpoint that one process leaves."""
    work, axes = (_over_gloo, "dp=2") if axes == "gloo" else (run, axes)
    layout, path = Mesh.parse(axes), tmp_path / "run.safetensors"
    found = launch(layout.size, work, tiny("gpt+alibi"), path, layout=layout, patience=60)
    (losses, score, whole), tensors = alone
    for ours, scored, here in found:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        assert scored == pytest.approx(score, rel=1e-5)
        assert here == whole if axes == "dp=2" else here < whole
    theirs, _ = checkpoint.load(path)
    assert set(theirs) == set(tensors)
    # A key's bias moves no softmax: its gradient is rounding, which Adam scales to steps as large as any.
    for name in (name for name in tensors if "key.bias" not in name):
        torch.testing.assert_close(theirs[name], tensors[name], rtol=1e-3, atol=1e-5)


def _on_its_own_clock(job, path):
    """Trains while the second process's clock runs twice as fast: on its own it would save twice as often."""
    monotonic, speed = time.monotonic, 1 + mesh.rank()
    began, time.monotonic = monotonic(), lambda: began + speed * (monotonic() - began)
    try:
        outcome = train(job, save_to=path, save_every=0.02)
    finally:
        time.monotonic = monotonic
    return outcome.progress.losses[-1][1]


@pytest.mark.parametrize("axes", ["fsdp=2", "pp=2"])
def test_processes_save_at_one_step_whatever_their_clocks(tiny, tmp_path, axes):
    job = dataclasses.replace(tiny(), steps=30)
    path = tmp_path / "run.safetensors"
    one, two = launch(2, _on_its_own_clock, job, path, layout=Mesh.parse(axes), patience=20)
    assert one == two


def _break(job, path, how):
    def each(progress):
        if progress.step == 1 and mesh.rank() == 1:
            if how == "stalls":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

    train(job, save_to=path, on_step=each)


@pytest.mark.parametrize(
    ("axes", "how", "end"),
    [
        *((axes, "dies", "SIGKILL") for axes in ("dp=2", "fsdp=2", "tp=2", "pp=2")),
        *((axes, "stalls", "stalled") for axes in ("dp=2", "pp=2")),
    ],
)
def test_a_lost_process_is_named_on_every_other(tiny, tmp_path, axes, how, end):
    began, patience = time.monotonic(), 4 if how == "stalls" else 60
    with pytest.raises(UserError, match=rf"lost rank 1 \({end}\) of 2; start again") as caught:
        layout = Mesh.parse(axes)
        launch(2, _break, tiny(), tmp_path / "run.safetensors", how, layout=layout, patience=patience)
    assert time.monotonic() - began < 50
    (said,) = caught.value.__notes__
    assert said.startswith("rank 0 of 2 lost another process (") and said.endswith("go on from the last checkpoint")


def _object(job, path):
    def each(progress):
        if mesh.rank() == 1:
            raise UserError("rank 1 knows better")

    train(job, save_to=path, on_step=each)


def test_a_mistake_that_one_process_sees_ends_all(tiny, tmp_path):
    launch(1, os.getpid)  # the server that processes are forked from has started
    began = time.monotonic()
    with pytest.raises(UserError, match="rank 1 knows better"):
        launch(2, _object, tiny(), tmp_path / "run.safetensors", layout=Mesh(dp=2), patience=4)
    assert time.monotonic() - began < 50


def test_another_number_of_processes_is_told_by_those_that_came():
    launch(1, os.getpid)
    began = time.monotonic()
    with pytest.raises(UserError, match="mesh dp=2 wants 2 processes, but 3 started; start 2"):
        launch(3, print, layout=Mesh(dp=2), patience=30)
    assert time.monotonic() - began < 50


def _tell_both():
    tell(f"from {mesh.rank()}")
    return mesh.rank()


def test_what_processes_tell_is_heard_while_they_work():
    heard = []
    assert launch(2, _tell_both, layout=Mesh(dp=2), patience=60, hear=heard.append) == [0, 1]
    assert sorted(heard) == ["from 0", "from 1"]
    tell("nobody listens")


def _interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    return "not ours"


def test_ctrl_c_is_not_for_those_that_were_launched():
    assert launch(1, _interrupted, patience=60) == ["not ours"]


@pytest.mark.parametrize(
    ("axes", "settings", "says"),
    [
        ("tp=3", ["model.dim=12"], r"tp=3 does not divide the 2 heads of stack\.blocks\.0\.mixer"),
        ("dp=3", [], r"a batch of 8 does not divide into the 3 pieces of mesh dp=3 .* loop\.batch to a multiple of 3"),
        ("pp=2", ["model.stack.depth=3"], "pp=2 does not divide the 3 blocks"),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_sentence(tiny, tmp_path, axes, settings, says):
    with pytest.raises(UserError, match=says):
        launch(
            Mesh.parse(axes).size,
            run,
            tiny("gpt", *settings),
            tmp_path / "run.safetensors",
            layout=Mesh.parse(axes),
            patience=30,
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dq=2", r"written as in dp=2,tp=2, of pp, dp, fsdp, tp; there is no 'dq'; did you mean 'dp'\?"),
        ("TP=2", r"there is no 'TP'; did you mean 'tp'\?"),
        ("zero=2", r"there is no 'zero'; did you mean 'fsdp'\?"),
        ("seeds=2", "of pp, dp, fsdp, tp; there is no 'seeds'$"),
        ("", "of pp, dp, fsdp, tp; there is no ''$"),
        ("dp", "'dp' in a mesh needs one count of at least 1, as in dp=2"),
        ("tp=0", "'tp=0' in a mesh needs one count"),
        ("tp=2,tp=2", "'tp=2' in a mesh needs one count"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_one_sentence(text, says):
    with pytest.raises(UserError, match=says):
        Mesh.parse(text)


def test_another_number_of_processes_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="mesh dp=2 wants 2 processes, but 3 started"), mesh.joined(Mesh(dp=2)):
        pass


def test_a_process_that_never_comes_is_not_waited_for(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(mesh, "ARRIVAL", 1)
    with pytest.raises(Lost, match="rank 0 of 2 lost another process"), mesh.joined(patience=1):
        pass
