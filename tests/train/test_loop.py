"""The loop: what is repeated comes out the same, what is interrupted goes on, what diverges says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltax import UserError, recipe
from deltax.train import checkpoint
from deltax.train.job import Job
from deltax.train.loop import build, train

TEXT = "".join(f"{i} is half of {2 * i}, and a third of {3 * i}.\n\n" for i in range(2000))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text(TEXT)

    def make(expression="gpt", *settings, **job):
        sizes = ["model.dim=12", "model.stack.depth=2", "task.context=16", "task.held_out=512", f"task.source={path}"]
        return Job(recipe(expression, [*sizes, *settings]), **{"steps": 12, **job})

    return make


def weights(outcome):
    return torch.cat([p.detach().flatten() for p in outcome.model.parameters()])


def test_the_same_job_twice_is_the_same_to_the_bit(tiny):
    first, second = train(tiny()), train(tiny())
    assert torch.equal(weights(first), weights(second))
    assert first.progress.losses == second.progress.losses
    assert first.evaluation.score == second.evaluation.score
    assert first.progress.tokens == 12 * 16 * 16


def test_a_caller_without_gradients_trains_too(tiny):
    with torch.no_grad():
        inside = train(tiny("gpt"))
    assert inside.progress.losses == train(tiny("gpt")).progress.losses


def test_another_seed_is_another_run(tiny):
    assert train(tiny()).progress.losses != train(tiny(seed=1)).progress.losses


def test_it_learns(tiny):
    losses = [loss for _, loss in train(tiny(steps=60)).progress.losses]
    assert losses[-1] < losses[0] - 1


def test_pairs_share_every_tensor_they_have_in_common(tiny):
    make = lambda job: build(job.recipe(), job.recipe["task"](), job.seed).state_dict()
    ours, theirs = make(tiny()), make(tiny("gpt+rope"))
    shared = set(ours) & set(theirs)
    assert len(shared) > 20 and "position.table" not in shared
    assert all(torch.equal(ours[k], theirs[k]) for k in shared)
    assert not torch.equal(make(tiny(seed=1))["embedding.weight"], ours["embedding.weight"])


@pytest.mark.parametrize("expression", ["gpt", "gpt+dyt"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny, tmp_path, expression):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 7:
            raise Killed

    job, path = tiny(expression), tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(job, save_to=path, save_every=0.0, on_step=kill)
    resumed = train(job, save_to=path)
    whole = train(job)
    assert torch.equal(weights(resumed), weights(whole))
    assert [tuple(pair) for pair in resumed.progress.losses] == whole.progress.losses


def test_a_run_that_diverges_ends_there(tiny):
    outcome = train(tiny(rate=1e12))
    assert outcome.diverged and outcome.evaluation is None
    assert outcome.progress.step < 12


def test_accumulating_pieces_is_the_whole_batch(tiny):
    whole, pieces = train(tiny()), train(tiny("gpt", "loop.accumulate=4"))
    # Not the weights: AdamW makes a whole step of the rounding in a gradient that is zero, as a key's bias has.
    assert len(whole.progress.losses) > 5
    torch.testing.assert_close(whole.progress.losses, pieces.progress.losses, rtol=1e-5, atol=0)


def test_a_recipe_that_cannot_be_built_is_one_sentence(tiny):
    with pytest.raises(UserError, match="cannot be built: dim 13 is not a multiple of 3 heads"):
        train(tiny("gpt", "model.dim=13"))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, {"a": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:500] if damage is None else damage)
    with pytest.raises(UserError, match=r"run\.safetensors is not a checkpoint.*delete it"):
        checkpoint.load(path)


def test_jobs_are_named_by_their_content(tiny):
    job = tiny()
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    others = [tiny(seed=1), tiny(steps=13), tiny(rate=2.0), tiny("gpt+dyt"), tiny("gpt", "loop.batch=8")]
    assert len({job.id, *(other.id for other in others)}) == 6


_SHARDED = """
import json, sys
from pathlib import Path
from deltax.train import mesh
from deltax.train.job import Job
from deltax.train.loop import train

job = Job.from_json(json.loads(Path(sys.argv[1]).read_text()))
with mesh.joined() as speaks:
    outcome = train(job, save_to=Path(sys.argv[2]), save_every=0.0)
    if speaks:
        found = {"losses": outcome.progress.losses, "score": outcome.evaluation.score, "processes": mesh.size()}
        print(json.dumps(found))
"""


def test_two_processes_that_share_a_model_lose_as_one(tiny, tmp_path):
    """FSDP2 under torchrun, with gloo on the CPU; its checkpoint is whole, so one process goes on where two stopped."""
    job = tiny("gpt+dyt")
    (tmp_path / "job.json").write_text(json.dumps(job.to_json()))
    (tmp_path / "sharded.py").write_text(_SHARDED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "sharded.py", tmp_path / "job.json", tmp_path / "run.safetensors"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[:4000]
    two, one = json.loads(done.stdout.splitlines()[-1]), train(job)
    assert two["processes"] == 2
    torch.testing.assert_close(
        torch.tensor(two["losses"])[:, 1], torch.tensor(one.progress.losses)[:, 1], rtol=1e-4, atol=1e-4
    )
    assert two["score"] == pytest.approx(one.evaluation.score, rel=1e-4)
    tensors, facts = checkpoint.load(tmp_path / "run.safetensors")
    assert facts["step"] == 12
    assert tensors["model/embedding.weight"].shape == (256, 12)
