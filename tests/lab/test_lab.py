import json
import math
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import sentence
from tiny import source, tiny

from deltax import catalog, claim
from deltax.lab import verify as verifying
from deltax.lab.lab import Lab
from deltax.lab.rehearsal import Rehearsal, rehearse
from deltax.lab.store import Store
from deltax.lab.verify import exclusive, verify
from deltax.tasks.evaluation import Evaluation
from deltax.train.job import task_of


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return source(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def lab(store) -> Lab:
    events = []
    lab = Lab(store, on_event=events.append)
    lab.seen = lambda: [event.kind for event in events]
    return lab


# Training


def test_a_trained_model_is_that_of_the_score_and_is_trained_once(text, store, lab):
    first = lab.train(tiny(text), seed=1000, steps=6)
    again = lab.train(tiny(text), seed=1000, steps=6)
    assert lab.seen().count("started") == 1 and lab.seen()[-1] == "reused"
    assert again.score == first.score and again.losses == first.losses and len(first.losses) == 6
    assert not again.model.training and not again.diverged
    measured = again.task.evaluate(again.model, tiny(text)["objective"])
    assert isinstance(again.evaluation, Evaluation)
    assert measured.score == again.score == again.evaluation.score
    assert np.array_equal(measured.values, again.evaluation.values)
    assert lab.task(tiny(text)) is task_of(tiny(text))


def test_steps_default_to_those_of_the_recipe(text, lab):
    assert len(lab.train(tiny(text, "gpt", "loop.steps=3"), seed=1000).losses) == 3


def test_rate_and_seed_make_other_runs(text, lab):
    scores = {lab.train(tiny(text), seed=s, steps=6, lr_scale=r).score for s in lab.seeds(2) for r in (1.0, 2.0)}
    assert len(scores) == 4


def test_the_tuned_rate_has_the_lowest_score_and_may_not_diverge(text, lab):
    rates = (1e-6, 1.0, 1e9)
    assert lab.tuned(tiny(text), rates, steps=6) == 1.0
    assert lab.seen().count("started") == 3
    assert (
        lab.train(tiny(text), seed=0, steps=6, lr_scale=1.0).score
        < lab.train(tiny(text), seed=0, steps=6, lr_scale=1e-6).score
    )


def test_training_from_weights_is_a_run_of_its_own(text, lab):
    fresh = lab.train(tiny(text), seed=1000, steps=6)
    state = fresh.model.state_dict()
    on = lab.train(tiny(text), seed=1001, steps=1, weights=state)
    assert lab.train(tiny(text), seed=1001, steps=1, weights=dict(reversed(state.items()))).score == on.score
    assert lab.seen().count("reused") >= 1
    other = {**state, "norm.bias": state["norm.bias"] + 1}
    assert lab.train(tiny(text), seed=1001, steps=1, weights=other).losses != on.losses
    assert lab.train(tiny(text), seed=1001, steps=1).losses[0][1] > on.losses[0][1]


def test_a_diverged_run_scores_infinitely_badly(text, lab):
    run = lab.train(tiny(text), seed=1000, steps=6, lr_scale=1e6)
    assert run.diverged and run.score == math.inf and run.score_at(context=8) == math.inf
    sentence(lambda: run.model, "gpt", "diverged")


def test_weights_that_were_deleted_are_trained_again(text, store, lab):
    first = lab.train(tiny(text), seed=1007, steps=3)
    first.result.weights_file.unlink()
    again = lab.train(tiny(text), seed=1007, steps=3)
    assert again.score == first.score and again.result.weights_file.exists()


def test_score_at_other_settings_is_measured_once(text, lab, monkeypatch):
    run = lab.train(tiny(text, "gpt+alibi"), seed=1000, steps=6)
    at = run.score_at(context=24)
    expected = task_of(tiny(text, "gpt+alibi", "task.context=24")).evaluate(run.model, tiny(text)["objective"]).score
    assert at == expected != run.score
    monkeypatch.setattr("deltax.tasks.language.text.Text.evaluate", None)
    assert lab.train(tiny(text, "gpt+alibi"), seed=1000, steps=6).score_at(context=24) == at
    sentence(lambda: run.score_at(contxt=24), "task.contxt", "task.context")


def test_watching_a_module_shows_what_goes_in_and_out(text, lab):
    run = lab.train(tiny(text), seed=1000, steps=6)
    given, gave = run.watch(run.model.norm)
    count = sum(len(batch.inputs) for batch in run.task.held_out_batches(64))
    assert given.shape == gave.shape == (count, 16, 9)
    torch.testing.assert_close(run.model.norm(given), gave)
    (gave * run.model.norm.gain).sum().backward()  # what was watched can be computed with
    assert torch.equal(run.watch("norm")[1], gave)
    assert not run.model.norm._forward_hooks
    sentence(lambda: run.watch(torch.nn.Linear(2, 2)), "Linear", "run.model")


# Verdicts


@pytest.mark.parametrize(
    ("values", "threshold", "outcome"),
    [
        ([0.9, 1.0, 1.1], 0.5, "supported at this scale"),
        ([0.9, 1.0, 1.1], 1.0, "inconclusive"),
        ([0.2, 0.21, 0.22], 0.5, "not seen at this scale"),
        ([-0.2, -0.21, -0.22], 0.5, "opposite at this scale"),
        ([-0.01, 0.0, 0.01], 0.5, "not seen at this scale"),
        ([math.inf] * 6, 0.5, "supported at this scale"),
        ([math.inf] * 3, 0.5, "inconclusive"),
        ([-math.inf] * 6, 0.5, "opposite at this scale"),
        ([-math.inf] * 5, 0.5, "opposite at this scale"),
        ([math.inf] * 5, 0.5, "supported at this scale"),
        ([-math.inf, 1.0, 1.0, 1.0, 1.0], 0.5, "inconclusive"),
        ([math.nan, 1.0, 1.0], 0.5, "inconclusive"),
    ],
)
def test_at_least_and_at_most_mirror_each_other(lab, values, threshold, outcome):
    verdict = lab.at_least(values, threshold, "bits")
    mirrored = lab.at_most([-v for v in values], -threshold, "bits")
    assert verdict.outcome == mirrored.outcome == outcome
    assert verdict.unit == "bits" and verdict.numbers["threshold"] == threshold
    if math.isfinite(sum(values)):
        assert verdict.estimate == pytest.approx(np.mean(values)) == pytest.approx(-mirrored.estimate)
        assert verdict.interval == pytest.approx([-end for end in reversed(mirrored.interval)])
        assert (
            verdict.could_have_seen == pytest.approx(-mirrored.could_have_seen) and verdict.could_have_seen > threshold
        )
    else:
        assert verdict.interval is None


def test_at_least_is_a_t_interval(lab):
    verdict = lab.at_least([1.0, 2.0, 4.0], 0.0, numbers={"more": 1}, figures={"caption": "<svg/>"})
    mean, half = 7 / 3, 4.302652729749464 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert verdict.interval == pytest.approx((mean - half, mean + half))
    assert verdict.numbers["values"] == [1.0, 2.0, 4.0] and verdict.numbers["more"] == 1
    assert verdict.figures == {"caption": "<svg/>"} and verdict.scale == "no training"
    sentence(lambda: lab.at_least([1.0], 0.0), "2 seeds")


def test_a_verdict_is_at_the_scale_of_the_largest_run(text, lab):
    lab.train(tiny(text), seed=1000, steps=6)
    lab.train(tiny(text), seed=1000, steps=3)
    verdict = lab.verdict("not testable here", estimate=1.0, interval=(0.0, 2.0))
    assert verdict.scale == lab.scale(tiny(text), 6) and verdict.interval == (0.0, 2.0)
    assert "parameters" in verdict.scale and "tokens" in verdict.scale
    assert lab.anew().verdict("inconclusive").scale == "no training"


def test_seeds_are_never_those_of_tuning(lab):
    assert list(lab.seeds(3)) == [1000, 1001, 1002]


def test_a_ratio_of_times_has_an_interval(lab):
    called = []
    ratio = lab.ratio(
        lambda: called.append("fast") or time.sleep(0.004), lambda: called.append("slow") or time.sleep(0.02), repeats=7
    )
    assert called.count("fast") == called.count("slow") == 8
    assert ratio.low <= ratio.value <= ratio.high and ratio.value > 1
    assert lab.verdict("inconclusive", interval=ratio).interval == (ratio.low, ratio.high)


def test_peak_memory_is_that_of_a_process_of_its_own(lab):
    assert 30e6 < lab.peak_memory(bytearray, 40_000_000, warm=[10]) < 60e6


def test_a_figure_is_the_same_svg_each_time(lab):
    from matplotlib.figure import Figure

    def drawn() -> str:
        figure = Figure()
        figure.subplots().plot([0, 1], [1, 0], label="line")
        return lab.figure(figure)

    assert drawn() == drawn() and "<svg" in drawn()


# verify

PAPER = '''"""A paper of this test. Nobody, 2020.

A transformer, but tested.
"""

from deltax import Part, claim, paper
from deltax.papers.language.models.gpt import gpt


@paper(on=gpt, year=2020)
def made_up(recipe: Part) -> Part:
    return recipe.put("model.depth", 1)


@claim
def two_and_two():
    """Two and two make four."""
    assert 2 + 2 == 4


@claim
def two_and_three():
    """Two and three make four."""
    assert 2 + 3 == 4, "they make five"


@claim.parity(peer="nobody")
def like_nobody():
    """The same as nobody's."""
    import a_peer_that_is_not_installed


@claim.measured(paper="1.0 (Table 1)")
def above_one(lab):
    """The values lie above one."""
    verdict = lab.at_least([2.0, 2.1, 2.2], 1.0, numbers={"infinite": float("inf")})
    return lab.verdict(verdict.outcome, estimate=verdict.estimate, interval=verdict.interval, numbers=verdict.numbers,
                       figures={"a picture": "<svg>1</svg>", "another": "<svg>2</svg>"})
'''


@pytest.fixture
def evidence(tmp_path, monkeypatch) -> Path:
    (tmp_path / "a_test_paper.py").write_text(PAPER)
    monkeypatch.syspath_prepend(tmp_path)
    record = replace(catalog.read(tmp_path / "a_test_paper.py"), module="a_test_paper")
    known = {record.key: record}
    monkeypatch.setattr(catalog, "papers", lambda: known)
    monkeypatch.setattr(catalog, "evidence_folder", lambda: tmp_path / "evidence")
    return tmp_path / "evidence"


def test_verify_keeps_what_every_claim_came_to(evidence, lab):
    evidence.mkdir()
    (evidence / "a-test-paper.json").write_text(json.dumps({"speed": {"kept": 1}, "measured": {"gone": {}}}))
    returned = verify("a-test-paper", lab=lab)
    stored = json.loads((evidence / "a-test-paper.json").read_text())
    assert stored == returned and stored["key"] == "a-test-paper" and stored["speed"] == {"kept": 1}
    assert stored["exact"]["two_and_two"]["passed"] is True
    assert (
        stored["exact"]["two_and_three"] | {"passed": False, "why": "AssertionError: they make five"}
        == (stored["exact"]["two_and_three"])
    )
    assert stored["parity"]["like_nobody"]["passed"] is None and stored["parity"]["like_nobody"]["peer"] == "nobody"
    [measured] = stored["measured"].values()
    assert measured["outcome"] == "supported at this scale" and measured["paper"] == "1.0 (Table 1)"
    assert measured["says"] == "The values lie above one." and measured["command"] == "dx verify a-test-paper"
    assert measured["estimate"] == pytest.approx(2.1) and len(measured["interval"]) == 2
    assert measured["numbers"]["infinite"] == "inf" and isinstance(measured["idle"], bool)
    assert measured["summary"].startswith("supported at this scale: +2.1") and measured["machine"]["cores"] >= 1
    assert measured["commit"] and measured["when"] and measured["seconds"] >= 0
    for n, (caption, name) in enumerate(measured["figures"].items(), 1):
        assert caption in ("a picture", "another") and name == f"figures/a-test-paper-above-one-{n}.svg"
        assert (evidence / name).read_text() == f"<svg>{n}</svg>"
    assert str(evidence) not in json.dumps(stored)


def test_verify_only_one_claim_keeps_the_others(evidence, lab):
    before = verify("a_test_paper", lab=lab)
    after = verify("a-test-paper", lab=lab, only="two-and-two")
    assert {k: v for k, v in after.items() if k != "exact"} == {k: v for k, v in before.items() if k != "exact"}
    assert after["exact"].keys() == before["exact"].keys()
    sentence(lambda: verify("a-test-paper", lab=lab, only="two_and_tow"), "no claim", "'two_and_two'")
    sentence(lambda: verify("a-test-papr", lab=lab), "no paper", "'a-test-paper'")


def test_a_rehearsal_cuts_training_short(text, lab):
    short = Rehearsal(lab.store)
    assert len(short.train(tiny(text), seed=1000, steps=50).losses) == 2 and len(short.seeds(5)) == 2
    assert len(short.train(tiny(text), seed=1000, steps=1).losses) == 1
    compared = short.compare(tiny(text), tiny(text, "gpt+dyt"), budget="claim", pairs=12)
    assert compared.plan.pairs == 2 and {arm.steps for arm in compared.plan.arms} == {2}


def test_a_rehearsal_keeps_nothing(evidence, monkeypatch):
    import a_test_paper

    assert dict(rehearse("a-test-paper", engine="inline")) == {"above_one": None}
    monkeypatch.setattr(a_test_paper, "above_one", _returns_nothing)
    assert dict(rehearse("a-test-paper")) == {"above_one": "it returned None, no Verdict"}
    monkeypatch.setattr(a_test_paper, "above_one", lambda lab: lab.trian())
    assert "has no attribute 'trian'" in dict(rehearse("a-test-paper"))["above_one"]
    assert not list(rehearse("a-test-paper", only="two_and_two")) and not evidence.exists()


def test_evidence_that_is_damaged_or_cannot_be_written(evidence, lab):
    evidence.mkdir()
    (evidence / "a-test-paper.json").write_text("{")
    sentence(lambda: verify("a-test-paper", lab=lab), "not JSON", "delete it")
    assert (evidence / "a-test-paper.json").read_text() == "{"
    (evidence / "a-test-paper.json").unlink()
    (evidence / "figures").write_text("in the way")
    sentence(lambda: verify("a-test-paper", lab=lab), "cannot write evidence")


def test_a_measured_claim_has_the_machine_for_itself(evidence, store, lab, monkeypatch):
    context = multiprocessing.get_context("fork")
    inside, over = context.Event(), context.Event()

    def hold() -> None:
        with exclusive(store):
            inside.set()
            over.wait(30)

    held = context.Process(target=hold)
    held.start()
    assert inside.wait(30)
    asked = []

    def flock(file, how, real=verifying.fcntl.flock):
        if file.name.endswith("machine.lock"):
            asked.append(how)
            with pytest.raises(BlockingIOError):
                real(file, how | verifying.fcntl.LOCK_NB)
            over.set()
        real(file, how)

    monkeypatch.setattr(verifying.fcntl, "flock", flock)
    assert verify("a-test-paper", lab=lab, only="above_one")["measured"]
    held.join()
    assert asked == [verifying.fcntl.LOCK_EX]


def test_a_measured_claim_that_returns_no_verdict_is_our_bug(evidence, lab, monkeypatch):
    import a_test_paper

    broken = claim.measured(paper="x")(_returns_nothing)
    monkeypatch.setattr(a_test_paper, "above_one", broken)
    with pytest.raises(TypeError, match="returns a Verdict"):
        verify("a-test-paper", lab=lab, only="above_one")


def _returns_nothing(lab):
    """Nothing."""


def test_a_papers_own_exact_claims_verify(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "evidence_folder", lambda: tmp_path)
    stored = verify("dyt", lab=lab, only="linear_near_zero")
    assert stored["exact"]["linear_near_zero"]["passed"] is True
