import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import sentence, small_disk  # noqa: F401
from tiny import jobs, source, tiny

from deltax.lab.engine import execute
from deltax.lab.lease import Worker
from deltax.lab.store import Store
from deltax.lab.trackers import tracker
from deltax.train import checkpoint
from deltax.train.job import Job

ROOT = Path(__file__).parents[2]
STEPS = 200  # a second on an idle core
PATIENCE = 120


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return source(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> dict:
    """What three runs come to when nothing happens to them."""
    return execute(jobs(text, 3, STEPS), store=Store(tmp_path_factory.mktemp("undisturbed")), engine="inline")


def equal(a: dict, b: dict) -> bool:
    same = lambda x, y: (x.score, x.losses, x.tokens) == (y.score, y.losses, y.tokens)
    return a.keys() == b.keys() and all(same(a[id], b[id]) and np.array_equal(a[id].values, b[id].values) for id in a)


class Process:
    """tiny.py in a process of its own."""

    def __init__(self, text: Path, folder: Path, engine: str, count: int):
        words = [str(w) for w in (Path(__file__).with_name("tiny.py"), text, folder, engine, count, STEPS)]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def until(self, found) -> list[str]:
        """The words of the first line that `found` accepts."""
        for line in self.process.stdout:
            if found(line.split()):
                return line.split()
        pytest.fail(f"it ended too soon: {self.process.stderr.read()}")

    def rest(self) -> tuple[list[str], str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return out.splitlines(), err


def mid_run(words: list[str]) -> bool:
    return words[0] == "step" and 0 < int(words[2]) < STEPS


def interrupted(store: Store) -> list[int]:
    """At which steps the checkpoints stand, once nobody trains any more."""
    deadline = time.monotonic() + 10
    while any(line.state == "running" for line in store.runs()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(line.state == "running" for line in store.runs())
    return [checkpoint.load(path)[1]["step"] for path in store.checkpoints.glob("*.safetensors")]


# Nothing is lost


def test_ctrl_c_then_kill_9_then_the_same_call_gives_the_same_figures(text, undisturbed, tmp_path):
    store = Store(tmp_path)
    first = Process(text, tmp_path, "local", 3)
    first.until(mid_run)
    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal does: to all of them
    sent = time.monotonic()
    lines, errors = first.rest()
    assert first.process.returncode == 130 and lines[-1] == "interrupted" and "Traceback" not in errors
    assert time.monotonic() - sent < 9  # a second where nothing else runs
    saved = interrupted(store)
    assert saved and all(0 < step < STEPS for step in saved)

    second = Process(text, tmp_path, "local", 3)
    _, id, step = second.until(mid_run)
    second.process.kill()
    second.process.communicate()
    assert int(step) > 0 and interrupted(store)
    events = []
    after = execute(jobs(text, 3, STEPS), store=store, engine="inline", on_event=events.append)
    assert equal(after, undisturbed)
    again = [event.step for event in events if event.kind == "step" and event.job.id == id]
    assert all(at > int(step) for at in again)
    assert not list(store.checkpoints.iterdir())


def test_two_processes_on_one_store_train_each_run_once(text, undisturbed, tmp_path):
    both = [Process(text, tmp_path, "inline", 3) for _ in range(2)]
    lines = [line.split() for process in both for line in process.rest()[0]]
    assert [process.process.returncode for process in both] == [0, 0]
    started = [words[1] for words in lines if words[0] == "started"]
    assert sorted(started) == sorted(undisturbed)
    finished = [words[1] for words in lines if words[0] in ("finished", "reused")]
    assert sorted(finished) == sorted([*undisturbed, *undisturbed])
    events = []
    results = execute(jobs(text, 3, STEPS), store=Store(tmp_path), engine="inline", on_event=events.append)
    assert equal(results, undisturbed) and {event.kind for event in events} == {"reused"}


def test_workers_survive_what_their_runs_do(text, undisturbed, tmp_path):
    """One run diverges, one cannot be built, the worker of one is killed: that one and the others finish."""
    store, events = Store(tmp_path), []
    good = jobs(text, 3, STEPS)
    diverging = Job(tiny(text), seed=1, steps=20, lr_scale=1e6)
    broken = Job(tiny(text, "gpt+rope", "model.stack.block.mixer.heads=2"), steps=20)

    def watch(event) -> None:
        if event.kind == "step" and 0 < event.step < STEPS and not any(e.kind == "restarted" for e in events):
            with store._lock:
                row = store._one("SELECT pid FROM runs WHERE id = ?", event.job.id)
            if row["pid"] and not killed:
                killed.append(event.job.id)
                os.kill(row["pid"], signal.SIGKILL)
        events.append(event)

    killed = []
    message = sentence(lambda: execute([*good, diverging, broken], store=store, on_event=watch), "gpt+rope", "heads")
    assert "more runs" not in message
    assert killed and [e.job.id for e in events if e.kind == "restarted"] == killed
    results = execute([*good, diverging], store=store, on_event=events.append)
    assert results[diverging.id].diverged and results[diverging.id].score is None
    assert equal({job.id: results[job.id] for job in good}, undisturbed)
    assert events[-1].done == events[-1].of == 4
    starts = [e.job.id for e in events if e.kind == "started"]
    assert set(starts[:2]) <= {job.id for job in good}, "the longest come first"


def test_a_run_of_another_process_is_waited_for(text, undisturbed, tmp_path):
    store, other = Store(tmp_path), Worker.here(os.getppid())
    [job, *_] = jobs(text, 1, STEPS)
    store.claim(job, other)
    events = []

    def watch(event) -> None:
        events.append(event.kind)
        if event.kind == "waiting":
            store.put(undisturbed[job.id])

    results = execute([job], store=store, engine="inline", on_event=watch)
    assert events == ["waiting", "finished"] and results[job.id].score == undisturbed[job.id].score


def test_a_run_says_how_many_threads_it_had(text, tmp_path):
    for threads in (1, 2):
        [result] = execute(
            jobs(text, 1, 2), store=Store(tmp_path / str(threads)), engine="inline", threads=threads
        ).values()
        assert result.environment["threads"] == threads


def test_a_damaged_checkpoint_restarts_its_run_alone(text, undisturbed, tmp_path):
    store, events = Store(tmp_path), []
    first, second, _ = jobs(text, 3, STEPS)
    for job in (first, second):
        with pytest.raises(KeyboardInterrupt):
            execute([job], store=store, engine="inline", on_event=_interrupt_at_step)
    whole = store.checkpoint_of(first).read_bytes()
    store.checkpoint_of(first).write_bytes(whole[: len(whole) // 2])
    results = execute([first, second], store=store, engine="inline", on_event=events.append)
    assert equal(results, {job.id: undisturbed[job.id] for job in (first, second)})
    [said] = [event for event in events if event.kind == "restarted"]
    bad = store.checkpoint_of(first).with_name(f"{first.id}.safetensors.bad")
    assert said.job == first and str(bad) in said.text and bad.read_bytes() == whole[: len(whole) // 2]
    begun = {event.job.id: event.step for event in reversed(events) if event.kind == "step"}
    assert begun[first.id] == 1 < begun[second.id]


def test_the_second_engine_goes_on_where_the_first_stopped_with_weights(text, undisturbed, tmp_path):
    store, events = Store(tmp_path), []
    [job] = jobs(text, 1, STEPS)
    store.put(undisturbed[job.id])
    results = execute([job], store=store, engine="inline", keep_weights=True, on_event=events.append)
    assert events[0].kind == "started", "without weights it is not what was asked for"
    assert equal(results, {job.id: undisturbed[job.id]}) and results[job.id].weights_file.exists()
    events.clear()
    execute([job], store=store, engine="inline", keep_weights=True, on_event=events.append)
    assert [e.kind for e in events] == ["reused"]


def test_a_run_starts_from_the_weights_it_names(text, tmp_path):
    store = Store(tmp_path)
    parent = replace(jobs(text, 1, 5)[0])
    weights = execute([parent], store=store, engine="inline", keep_weights=True)[parent.id].weights_file
    state, _ = checkpoint.load(weights)
    checkpoint.save(store.start_of("abc"), state, {})
    child = replace(parent, start="abc")
    assert child.id != parent.id and Job.from_json(child.to_json()) == child
    losses = execute([child], store=store, engine="inline")[child.id].losses
    assert losses[0][1] < execute([parent], store=store, engine="inline")[parent.id].losses[0][1]


def test_a_full_disk_stops_everything_in_one_sentence(text, small_disk, request):  # noqa: F811
    folder, seal = small_disk
    store, (first, second) = Store(folder), jobs(text, 2, 5)
    execute([first], store=store, engine="inline", keep_weights=True)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(b"\0" * (free - 8192))
    attempt = lambda: execute([second], store=store, engine="inline", keep_weights=True)
    sentence(attempt, str(folder), "--store")
    (folder / "filler").unlink()
    assert attempt()[second.id].weights_file.exists() and store.get(first).weights_file.exists()
    store.close()
    seal()
    reading = Store(folder)
    assert len(execute([first, second], store=reading, engine="inline")) == 2
    sentence(lambda: execute(jobs(text, 3, 5), store=reading, engine="inline"), "cannot be written", "--store")


def test_an_error_that_is_nobodys_mistake_is_named_and_kept_whole(text, tmp_path, monkeypatch):
    monkeypatch.setattr("deltax.lab.worker.train", lambda *_, **__: 1 / 0)
    store = Store(tmp_path)
    [job] = jobs(text, 1, 5)
    sentence(lambda: execute([job], store=store, engine="inline"), "gpt", "ZeroDivisionError", str(tmp_path))
    assert "Traceback" in (tmp_path / "failed" / f"{job.id}.txt").read_text()
    assert not store.runs()  # it took no step


def test_unknown_engines_and_no_workers(text, tmp_path):
    wanted = {"store": Store(tmp_path)}
    sentence(lambda: execute(jobs(text, 1, 5), engine="lokal", **wanted), "lokal", "'local'")
    sentence(lambda: execute(jobs(text, 1, 5), workers=0, **wanted), "at least 1 worker")
    assert execute([], **wanted) == {}


@pytest.mark.parametrize("alone", ["", "with exclusive(Store(sys.argv[2])): "])
def test_an_unguarded_script_is_told_to_guard_itself(text, tmp_path, alone):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nsys.path.insert(0, sys.argv[3])\nfrom pathlib import Path\nfrom tiny import Store, execute, jobs\n"
        f"from deltax.lab.verify import exclusive\n{alone}"
        "execute(jobs(Path(sys.argv[1]), 1, 5), store=Store(sys.argv[2]), workers=1)\n"
    )
    words = [sys.executable, str(script), str(text), str(tmp_path / "runs"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]


def test_ray_gives_the_same_figures(text, undisturbed, tmp_path):
    ray = pytest.importorskip("ray")
    package = str(ROOT / "deltax")
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, runtime_env={"py_modules": [package], "env_vars": {"OMP_NUM_THREADS": "1"}}, **quiet)
    try:
        store, events = Store(tmp_path), []
        good, diverging = jobs(text, 2, STEPS), Job(tiny(text), seed=1, steps=20, lr_scale=1e6)
        with pytest.raises(KeyboardInterrupt):
            execute(good[:1], store=store, engine="inline", on_event=_interrupt_at_step)
        options = {"store": store, "engine": "ray", "keep_weights": True, "on_event": events.append}
        results = execute([*good, diverging], **options)
    finally:
        ray.shutdown()
    assert results[diverging.id].diverged
    assert equal({job.id: results[job.id] for job in good}, {job.id: undisturbed[job.id] for job in good})
    assert min(e.step for e in events if e.kind == "step" and e.job == good[0]) > 1, "it goes on from the checkpoint"
    assert all(store.get(job).weights_file.exists() for job in good) and len(store.runs()) == 3


def test_no_ray_is_said_with_its_extra(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = lambda: execute(jobs(text, 1, 5), store=Store(tmp_path), engine="ray")
    sentence(run, "pip install 'deltax-ml[ray]'")


# Trackers


@pytest.fixture
def tracked(text, tmp_path):
    """Run one job twice, trained and then reused, under a tracker; its job and result."""

    def run(name: str):
        [job] = jobs(text, 1, 5)
        for _ in range(2):
            log = tracker(name, tmp_path / "log")
            log("what a comparison plans, which is no event of a run")
            result = execute([job], store=Store(tmp_path / "runs"), engine="inline", on_event=log)[job.id]
            log.close()
        return job, result

    return run


def test_tensorboard_holds_the_losses(tracked, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job, result = tracked("tensorboard")
    read = EventAccumulator(str(tmp_path / "log" / job.id)).Reload()
    losses = {event.step: event.value for event in read.Scalars("train/nats")}
    assert losses == {step: float(np.float32(nats)) for step, nats in result.losses}
    assert read.Scalars("held_out/score")[-1].value == pytest.approx(result.score)


class Run:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], 0

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_wandb_and_trackio_are_ours_by_id(tracked, monkeypatch, name):
    made = []
    library = types.SimpleNamespace(init=lambda **options: made.append(Run(**options)) or made[-1])
    monkeypatch.setitem(sys.modules, name, library)
    job, result = tracked(name)
    for run in made:
        assert run.options["project"] == "deltax" and job.id in run.options.values() and run.finished == 1
        losses = [(step, metrics["train/nats"]) for step, metrics in run.logged if "train/nats" in metrics]
        assert losses == result.losses
        assert run.logged[-1] == (5, {"held_out/score": result.score})
        steps = [step for step, _ in run.logged]
        assert steps == sorted(steps), "wandb drops what goes back"
    assert len(made) == 2


def test_mlflow_gets_parameters_and_metrics(tracked, monkeypatch):
    called = []

    class Client:
        def __getattr__(self, name):
            return lambda *args, **options: called.append((name, args, options)) or self.answer(name)

        def answer(self, name):
            run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="theirs"))
            return {"create_run": run, "get_experiment_by_name": None, "create_experiment": "7"}.get(name)

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    job, result = tracked("mlflow")
    assert ("log_param", ("theirs", "deltax", job.id), {}) in called
    losses = [(o["step"], a[2]) for n, a, o in called if n == "log_metric" and a[:2] == ("theirs", "train/nats")]
    assert losses == result.losses * 2 and called[-1] == ("set_terminated", ("theirs",), {})


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        sentence(lambda name=name: tracker(name, tmp_path), f"pip install 'deltax-ml[{name}]'")
    sentence(lambda: tracker("tensorbord", tmp_path), "'tensorboard'")


def _interrupt_at_step(event) -> None:
    """As if Ctrl-C was pressed when the run has begun."""
    if event.kind == "step":
        signal.raise_signal(signal.SIGINT)
