"""DiLoCo with a process for each worker: the numbers of one process, and a run that outlives its workers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltax import UserError, recipe
from deltax.parts.distributed.exchange import ring_bytes
from deltax.train import checkpoint
from deltax.train.job import Job
from deltax.train.loop import train
from deltax.train.meeting import Meeting, register

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"{i} is half of {2 * i}, and a third of {3 * i}.\n\n" for i in range(2000))


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(TEXT)
    sizes = ["model.dim=12", "model.stack.depth=1", "task.context=16", "task.held_out=512", f"task.source={path}"]
    return lambda expression, *settings, steps: Job(recipe(expression, [*sizes, *settings]), steps=steps)


_WORKER = """
import json, sys, time
from pathlib import Path
from deltax.train import checkpoint
from deltax.train.islands import train
from deltax.train.job import Job
from deltax.train.meeting import Meeting

job, into, worker, at, patience, start = sys.argv[1:]
job = Job.from_json(json.loads(Path(job).read_text()))
meeting = Meeting(at, int(worker), job.recipe["optimizer.workers"], patience=float(patience), start=float(start))
alone = []

def tell(round):
    print(json.dumps(vars(round)), flush=True)
    if len(round.members) < meeting.workers:
        alone.append(round)
    if len(alone) == 3 and len(round.members) < meeting.workers:
        deadline = time.monotonic() + 60
        while not meeting.store.check(["tokens"]) and time.monotonic() < deadline:  # until somebody wants to join
            time.sleep(0.01)

outcome = train(job, meeting, on_round=tell)
print(json.dumps({"score": outcome.evaluation.score, "losses": outcome.progress.losses}))
checkpoint.save(Path(into), outcome.model.state_dict(), {})
"""


class Island:
    """A worker process, and what it has told so far."""

    def __init__(self, job, folder, worker, port, *, patience=20.0, start=60.0, life=""):
        self.into, self.out = folder / f"{worker}{life}.safetensors", folder / f"{worker}{life}.out"
        told = self.out.with_suffix(".json")  # of its own: who starts may read while another is made
        told.write_text(json.dumps(job.to_json()))
        command = [sys.executable, "-c", _WORKER, told, self.into, worker]
        command += [f"127.0.0.1:{port}", patience, start]
        with self.out.open("w") as out, self.out.with_suffix(".err").open("w") as err:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, env=environment)

    def told(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def rounds(self):
        return {line["round"]: line for line in self.told() if "round" in line}

    def wait(self, until, seconds=150.0):
        deadline = time.monotonic() + seconds
        while not until(self):
            assert self.process.poll() in (None, 0), self.out.with_suffix(".err").read_text()
            assert time.monotonic() < deadline, f"nothing within {seconds} s"
            time.sleep(0.02)

    def end(self, seconds=150.0):
        assert self.process.wait(seconds) == 0, self.out.with_suffix(".err").read_text()
        return self.told()[-1]


@pytest.fixture
def islands():
    started = []
    yield started
    for island in started:
        if island.process.poll() is None:
            island.process.kill()
            island.process.wait()


def test_processes_give_the_numbers_of_one(job, tmp_path, islands):
    this = job("gpt+diloco(workers=2, every=3)", steps=18)
    held = register()
    islands += [Island(this, tmp_path, w, held.port) for w in range(2)]
    one, ends = train(this), [island.end() for island in islands]
    losses = sorted(pair for end in ends for pair in map(tuple, end["losses"]))
    assert [step for step, _ in losses] == list(range(18))
    torch.testing.assert_close(
        torch.tensor(losses)[:, 1], torch.tensor(one.progress.losses)[:, 1], rtol=1e-4, atol=1e-4
    )
    for island in islands:
        tensors, _ = checkpoint.load(island.into)
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-5)
    numbers = sum(p.numel() for p in one.model.parameters())
    assert [island.rounds()[3]["sent"] for island in islands] == [3 * ring_bytes(numbers, 2)] * 2


def test_a_worker_dies_and_comes_back(job, tmp_path, islands):
    """Worker 1 is killed in the middle; the others go on without it, it returns and takes part until the end."""
    this = job("gpt+diloco(workers=3, every=4)", "schedule.floor=1.0", steps=3 * 4 * 20)
    held = register()
    islands += [Island(this, tmp_path, w, held.port, patience=5.0) for w in range(3)]
    islands[1].wait(lambda i: len(i.rounds()) >= 3)
    islands[1].process.kill()
    islands.append(Island(this, tmp_path, 1, held.port, patience=5.0, life="back"))
    first, third, back = (islands[i].end() for i in (0, 2, 3))
    members = [line["members"] for _, line in sorted(islands[0].rounds().items())]
    assert sorted(islands[0].rounds()) == list(range(1, 21)), "a round is lost"
    assert members[0] == members[-1] == [0, 1, 2] and [0, 2] in members
    weights = [checkpoint.load(islands[i].into)[0] for i in (0, 2, 3)]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value) and torch.equal(weights[2][name], value), name
    assert first["score"] == third["score"] == back["score"]
    losses = [loss for _, loss in first["losses"]]
    assert sum(losses[-8:]) < sum(losses[:8]) - 8


def test_a_worker_alone_goes_on_after_its_patience(job, tmp_path, islands):
    """Two of three never come: the one that did waits for so long once, in the first round, and then no more."""
    held = register()
    islands.append(Island(job("gpt+local-sgd(workers=3, every=2)", steps=12), tmp_path, 2, held.port, start=1.0))
    islands[0].end()
    assert [line["members"] for line in islands[0].rounds().values()] == [[2]] * 2


def test_the_command_trains_a_worker(job, tmp_path, capsys):
    from deltax.train import islands

    held, path = register(), tmp_path / "job.json"
    path.write_text(json.dumps(job("gpt+diloco(workers=1, every=2)", steps=4).to_json()))
    address = f"127.0.0.1:{held.port}"
    islands.main(["work", str(path), "--worker", "0", "--at", address, "--into", str(tmp_path / "weights")])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("round") for line in told] == [1, 2, None] and told[-1]["score"] > 0
    assert checkpoint.load(tmp_path / "weights")[0]
    with pytest.raises(UserError, match="the run is over"):
        islands.main(["work", str(path), "--worker", "0", "--at", address])


def test_a_register_that_dies_ends_the_run_with_one_sentence(job, tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job("gpt+diloco(workers=1, every=1)", steps=10**6).to_json()))
    command, environment = [sys.executable, "-m", "deltax.train.islands"], {**os.environ, "PYTHONPATH": str(ROOT)}
    given = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*command, "register", "0"], **given) as held:
        port = held.stdout.readline().split()[-1]
        address = ["--worker", "0", "--at", f"127.0.0.1:{port}", "--patience", "5"]
        with subprocess.Popen([*command, "work", str(path), *address], stderr=subprocess.PIPE, **given) as worker:
            assert json.loads(worker.stdout.readline())["round"] == 1
            held.kill()
            _, error = worker.communicate(timeout=120)
    assert worker.returncode == 2 and error.splitlines()[-1].startswith("dx: the register of the run is gone")


def test_another_job_is_one_sentence(job):
    from deltax.train.islands import train as train_island

    held, this = register(), job("gpt+diloco(workers=1)", steps=4)
    train_island(this, Meeting(f"127.0.0.1:{held.port}", 0, 1))
    with pytest.raises(UserError, match="give all workers one job"):
        train_island(job("gpt+diloco(workers=1)", steps=5), Meeting(f"127.0.0.1:{held.port}", 0, 1))


def test_no_register_is_one_sentence():
    with pytest.raises(UserError, match="no register of a run answers"):
        Meeting("127.0.0.1:1", 0, 2, patience=0.5)


def test_a_run_without_workers_is_one_sentence(job):
    from deltax.train.islands import train as train_island

    held = register()
    with pytest.raises(UserError, match="add local-sgd or diloco"):
        train_island(job("gpt", steps=4), Meeting(f"127.0.0.1:{held.port}", 0, 2))
