import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import source, tiny

from deltax import address
from deltax.errors import StoreError, UserError
from deltax.lab import store as stores
from deltax.lab.lease import Worker
from deltax.lab.store import Result, Store
from deltax.train.job import Job


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return Job(tiny(source(tmp_path_factory.mktemp("text"))), seed=3, steps=7)


def result(job: Job, score: float | None = 2.5) -> Result:
    values = np.array([2.0, 3.0 + 1e-15]) if score else np.empty(0)
    rows = np.arange(len(values))
    losses = [(0, 5.5), (1, 0.1 + 0.2)] + ([] if score else [(2, math.inf)])
    facts = {"metrics": {"accuracy": 0.5}, "environment": {"threads": 1}}
    return Result(
        job, score, values, rows + 1.0, rows, losses=losses, tokens=12, seconds=1.5, diverged=not score, **facts
    )


def sentence(trigger, *needles: str) -> str:
    with pytest.raises(UserError) as caught:
        trigger()
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message
    return message


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB of its own; a function that makes it read-only."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let even root mount a disk")
    yield tmp_path, lambda: subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


# What is kept


def test_a_result_comes_back_to_the_bit(tmp_path, job):
    put = result(job)
    Store(tmp_path).put(put)
    got = Store(tmp_path).get(job)
    for name in ("values", "weights", "clusters"):
        ours, theirs = getattr(got, name), getattr(put, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    plain = {"values": None, "weights": None, "clusters": None}
    assert replace(got, **plain) == replace(put, **plain)
    assert Store(tmp_path).get(replace(job, seed=4)) is None


def test_a_diverged_run_is_a_result(tmp_path, job):
    store = Store(tmp_path)
    store.put(result(job, None))
    got = store.get(job)
    assert got.diverged and got.score is None and got.losses[-1] == (2, math.inf) and got.values.size == 0
    assert [line.state for line in store.runs()] == ["diverged"]


def test_weights_are_named_once_they_are_there(tmp_path, job):
    store = Store(tmp_path)
    store.put(result(job))
    assert store.get(job).weights_file is None
    store.weights.mkdir()
    store.weights_of(job).touch()
    assert store.get(job).weights_file == store.runs()[0].weights_file == store.weights_of(job)


def test_a_finished_run_leaves_neither_lease_nor_checkpoint(tmp_path, job):
    store = Store(tmp_path)
    assert store.claim(job, Worker.here())
    store.checkpoints.mkdir()
    store.checkpoint_of(job).touch()
    store.put(result(job))
    assert not store.checkpoint_of(job).exists()
    assert not store.heartbeat(job, Worker.here())


def test_records_are_kept_by_kind_and_key(tmp_path):
    store = Store(tmp_path)
    store.remember("noise", "a", {"sd": 0.1, "df": 4})
    store.remember("noise", "b", [1, None])
    store.remember("speed", "a", 3.5)
    store.remember("noise", "a", {"sd": 0.2, "df": 4})
    again = Store(tmp_path)
    assert again.recall("noise", "a") == {"sd": 0.2, "df": 4} and again.recall("noise", "c") is None
    assert again.records("noise") == {"b": [1, None], "a": {"sd": 0.2, "df": 4}}


def test_runs_are_listed_latest_first_without_torch(tmp_path, job):
    store = Store(tmp_path)
    store.put(result(job))
    store.claim(replace(job, seed=9), Worker.here())
    store.heartbeat(replace(job, seed=9), Worker.here(), 2, 4.5, 100.0)
    running, finished = store.runs()
    assert (running.state, running.step, running.seed) == ("running", 2, 9)
    assert (finished.state, finished.score, finished.title, finished.steps) == ("finished", 2.5, "gpt", 7)
    assert store.runs(limit=1) == [running] and store.runs("dyt") == [] and len(store.runs("gp")) == 2
    look = "import sys; from deltax.lab import Store; print(len(Store(sys.argv[1]).runs()), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", look, tmp_path], check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["2", "False"]


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path, job):
    store = Store(tmp_path)
    for seed in range(40):
        store.put(result(replace(job, seed=seed), seed + 1.0))
    target = replace(job, seed=17)
    found = store.find(target.id[:9])
    assert found.job == target and found.job.id == target.id and found.score == 18.0
    wrong = target.id[:7] + ("0" if target.id[7] != "0" else "1") + target.id[8:]
    sentence(lambda: store.find(wrong), "no finished run", "did you mean", target.id)
    sentence(lambda: store.find(""), "40 runs", "more of the id")
    sentence(lambda: store.find("zzzz"), "dx runs")


def test_the_folder_is_the_one_given_else_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    assert Store().folder == tmp_path / "home" / "runs"
    assert Store(tmp_path / "there").folder == tmp_path / "there"
    monkeypatch.delenv("DELTAX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().folder == tmp_path / ".local/share/deltax/runs"


# Leases


def test_a_lease_is_of_one_living_worker(tmp_path, job):
    store, us, other = Store(tmp_path), Worker.here(), Worker.here(os.getppid())
    assert store.claim(job, us) and store.claim(job, us)
    assert not Store(tmp_path).claim(job, other)
    store.release(job, other)
    assert not store.claim(job, other)
    store.release(job, us)
    assert store.claim(job, other)
    assert not store.heartbeat(job, us, 1, 1.0, 1.0)
    assert store.progress(job) is None


def test_a_dead_workers_lease_is_taken_over_at_once(tmp_path, job):
    store = Store(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as child:
        theirs = Worker.here(child.pid)
        assert store.claim(job, theirs) and not store.claim(job, Worker.here())
        child.kill()
        deadline = time.monotonic() + 5
        while not (taken := store.claim(job, Worker.here())) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert taken and not store.heartbeat(job, theirs)


_ANNOUNCES = """
import sys, time
from deltax.lab.store import Store
with Store(sys.argv[1]).announced("comparing", {"plan": "theirs"}):
    print("said", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_announced_is_over(tmp_path):
    store = Store(tmp_path)
    with store.announced("comparing", {"plan": "ours"}):
        assert [what for _, what in Store(tmp_path).going_on("comparing")] == [{"plan": "ours"}]
        with subprocess.Popen([sys.executable, "-c", _ANNOUNCES, str(tmp_path)], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            assert [what["plan"] for _, what in store.going_on("comparing")] == ["ours", "theirs"]
            child.kill()
        assert [what["plan"] for _, what in store.going_on("comparing")] == ["ours"]
        assert len(store.records("comparing")) == 2
        with store.announced("comparing", {"plan": "next"}):
            assert len(store.records("comparing")) == 2, "what is left behind is swept when the next begins"
    assert store.records("comparing") == {}


def test_another_machines_announcement_lasts_as_long_as_it_trains(tmp_path, job, monkeypatch):
    store, far = Store(tmp_path), Worker("elsewhere", 1, 1)
    monkeypatch.setattr(stores.Worker, "here", lambda: far)
    with store.announced("comparing", {"plan": "a"}):
        now = time.time()
        assert store.claim(job, far)
        for later, lives in ((50, True), (70, False)):
            monkeypatch.setattr(stores.time, "time", lambda later=later: now + later)
            assert bool(store.going_on("comparing")) == lives
        store.heartbeat(job, far)
        assert store.going_on("comparing")


def test_a_process_of_the_same_number_is_not_the_same_worker(tmp_path, job):
    store, us = Store(tmp_path), Worker.here()
    assert store.claim(job, replace(us, born=us.born - 1))
    assert store.claim(job, us)


def test_another_machines_lease_lasts_a_minute_of_silence(tmp_path, job, monkeypatch):
    store, far = Store(tmp_path), Worker("elsewhere", 1, 1)
    assert store.claim(job, far) and not store.claim(job, Worker.here())
    now = time.time()
    monkeypatch.setattr(stores.time, "time", lambda: now + 50)
    assert not store.claim(job, Worker.here())
    assert store.heartbeat(job, far)
    monkeypatch.setattr(stores.time, "time", lambda: now + 105)
    assert not store.claim(job, Worker.here())
    monkeypatch.setattr(stores.time, "time", lambda: now + 111)
    assert store.claim(job, Worker.here())


def test_progress_is_that_of_the_last_beat(tmp_path, job):
    store = Store(tmp_path)
    store.claim(job, Worker.here())
    assert store.progress(job) is None
    store.heartbeat(job, Worker.here(), 3, 4.5, 1000.0)
    store.heartbeat(job, Worker.here())
    assert store.progress(job) == (3, 7, 4.5, 1000.0)
    store.put(result(job))
    assert store.progress(job) is None


# What can be wrong with a disk


def test_a_damaged_database_is_said_and_left_alone(tmp_path, job):
    store = Store(tmp_path)
    for seed in range(50):
        store.put(result(replace(job, seed=seed)))
    store.close()
    whole = store.file.read_bytes()
    for damaged in (b"not a database, by any means" * 99, whole[:4096] + os.urandom(len(whole) - 4096)):
        store.file.write_bytes(damaged)
        message = sentence(lambda: Store(tmp_path).runs(), str(store.file), "damaged", "nothing was changed", "--store")
        assert "sqlite3" not in message
        assert store.file.read_bytes() == damaged
    store.file.write_bytes(whole)
    assert len(Store(tmp_path).runs()) == 50


def test_a_later_deltaxs_store_is_left_alone(tmp_path):
    store = Store(tmp_path)
    store.close()
    with sqlite3.connect(store.file) as db:
        db.execute("PRAGMA user_version = 99")
    sentence(lambda: Store(tmp_path), "later deltax", "upgrade")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    sentence(lambda: Store(tmp_path / "taken"), "taken", "--store")


def test_a_full_database_loses_nothing(tmp_path, job):
    store = Store(tmp_path)
    store.put(result(job))
    store._db.execute("PRAGMA max_page_count = 12")

    def fill() -> None:
        for key in range(99):
            store.remember("filling", str(key), "x" * 3000)

    sentence(fill, str(tmp_path), "full", "free some space", "--store")
    kept = store.records("filling")
    assert 0 < len(kept) < 99 and store.get(job).score == 2.5
    assert Store(tmp_path).records("filling") == kept


def test_a_full_disk_loses_nothing(small_disk, job):
    folder, _ = small_disk
    store = Store(folder)
    store.put(result(job))
    (folder / "filler").write_bytes(b"\0" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))

    def fill() -> None:
        for key in range(999):
            store.remember("filling", str(key), "x" * 3000)

    sentence(fill, str(folder), "full", "free some space", "--store")
    (folder / "filler").unlink()
    store.remember("filling", "last", 1)
    assert Store(folder).recall("filling", "last") == 1 and Store(folder).get(job).score == 2.5


def test_a_read_only_store_can_be_read(small_disk, job):
    folder, seal = small_disk
    store = Store(folder)
    store.put(result(job))
    store.close()
    seal()
    reading = Store(folder)
    assert reading.get(job).score == 2.5 and len(reading.runs()) == 1
    for attempt in (reading.check_writable, lambda: reading.put(result(job))):
        sentence(attempt, str(folder), "cannot be written", "--store")
    sentence(lambda: reading.claim(replace(job, seed=8), Worker.here()), "cannot be written")
    sentence(lambda: Store(folder / "new"), "cannot be written")


def test_a_store_that_may_not_be_written(tmp_path, job):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; see the read-only disk")
    store = Store(tmp_path / "runs")
    store.put(result(job))
    store.close()
    store.file.chmod(0o400)
    store.folder.chmod(0o500)
    try:
        reading = Store(store.folder)
        assert reading.get(job).score == 2.5
        sentence(reading.check_writable, "cannot be written")
    finally:
        store.folder.chmod(0o700)


def test_errors_of_the_disk_are_told_from_others(tmp_path):
    with pytest.raises(StoreError):
        Store(Path("/proc/none"))
    assert issubclass(StoreError, UserError)


# What an earlier deltax stored


def as_it_was_stored(data):
    """A tree with addresses as they were before: the module's whole name."""
    if isinstance(data, list):
        return [as_it_was_stored(item) for item in data]
    if not isinstance(data, dict) or "make" not in data:
        return data
    make = address.find(data["make"])
    given = {k: as_it_was_stored(v) for k, v in data["given"].items()}
    return {"make": f"{make.__module__}:{make.__qualname__}", "given": given}


def rewritten(store, job, edit):
    told = job.to_json()
    with sqlite3.connect(store.file) as db:
        changed = json.dumps({**told, "recipe": edit(told["recipe"])})
        db.execute("UPDATE runs SET job = ? WHERE id = ?", (changed, job.id))


def test_runs_from_before_addresses_lost_their_folders_still_open(tmp_path, job):
    store = Store(tmp_path)
    store.put(result(job))
    rewritten(store, job, as_it_was_stored)
    again = Store(tmp_path).find(job.id)
    assert again.job == job and again.job.id == job.id


@pytest.mark.parametrize("lost", ["deltax.papers.language.dyt:Gone", "papers.gone:Gone", "deltax.cli:main"])
def test_a_run_of_a_definition_that_is_gone_is_one_sentence(tmp_path, job, lost):
    store = Store(tmp_path)
    store.put(result(job))
    rewritten(store, job, lambda tree: {**tree, "given": {**tree["given"], "schedule": {"make": lost, "given": {}}}})
    sentence(lambda: Store(tmp_path).find(job.id), lost.partition(":")[2 if "dyt" in lost else 0].rpartition(".")[2])
    assert [line.id for line in Store(tmp_path).runs()] == [job.id], "it is listed all the same"
