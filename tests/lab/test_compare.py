"""The experiment, on runs whose losses are known (PROTOCOL.md A.1, A.2.8), and once on real ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import SLOPE, STEPS, Truth

from deltax import compare
from deltax.errors import UserError
from deltax.lab.gain import Position
from deltax.lab.plan import FACTORS, TUNING_SEED, Plan
from deltax.lab.statistics import Outcome, asked_margin
from deltax.lab.store import Store


def test_the_experiment_follows_the_protocol(tiny, store, world):
    made = world({"gpt+dyt": Truth(gain=1.5)})
    events = []
    c = compare(tiny(), tiny("gpt+dyt"), store=store, on_event=events.append)
    assert isinstance(events[0], Plan)
    assert {job.lr_scale for job in made.trained if job.seed == TUNING_SEED and job.steps == STEPS} == set(FACTORS)
    scored = [job for job in made.trained if job.seed != TUNING_SEED and job.steps == STEPS]
    assert sorted({job.seed for job in scored}) == [1, 2, 3, 4, 5] and len(scored) == 10
    assert len({(job.recipe.title, job.lr_scale) for job in scored}) == 2
    ladder = [job for job in made.trained if job.steps != STEPS]
    assert {job.steps for job in ladder} == {STEPS // 2, 2 * STEPS} and {job.recipe.title for job in ladder} == {"gpt"}
    assert sum(job.seed == TUNING_SEED for job in ladder) == 6 and sum(job.seed != TUNING_SEED for job in ladder) == 6
    assert sum(c.plan.runs().values()) == len(made.trained)
    assert {k: v["runs"] for k, v in c.spent.items()} == {"tuning": 10, "scoring": 10, "ladder": 12}
    flops = sum(job.steps * c.plan.x.flops_per_step for job in made.trained)
    assert sum(v["flops"] for v in c.spent.values()) == pytest.approx(flops, rel=1e-2)


def test_it_is_announced_while_it_goes_on(tiny, store, world, monkeypatch):
    made, told = world({"gpt+dyt": Truth(gain=1.5)}), []
    execute = made.execute
    monkeypatch.setattr(made, "execute", lambda *a, **k: told.append(store.going_on("comparing")) or execute(*a, **k))
    monkeypatch.setattr("deltax.lab.compare.execute", made.execute)
    c = compare(tiny(), tiny("gpt+dyt"), store=store)
    assert told and all([what for _, what in seen] == [c.plan.announcement()] for seen in told)
    x, y = c.plan.announcement()["arms"]
    assert (x["title"], y["title"]) == ("gpt", "gpt+dyt") and c.plan.announcement()["runs"] == 32
    lengths = {"gpt": x["steps"], "gpt+dyt": y["steps"]}
    assert all(job.steps in lengths[job.recipe.title] for job in made.trained)
    assert store.going_on("comparing") == []


def test_every_arm_gets_the_same_flops(tiny, store, world):
    world({})
    wide = tiny().put("model.stack.block.mlp.widen", 16)
    x, y = compare(tiny(), wide, store=store).plan.arms
    assert y.flops_per_step > 1.4 * x.flops_per_step
    assert abs(y.flops - x.flops) <= y.flops_per_step / 2
    x, y = compare(tiny(), wide, store=store, budget="2k tokens").plan.arms
    assert x.steps == y.steps == round(2000 / 64)


def test_a_disguised_budget_is_recovered(tiny, store, world):
    covered, sure, trials = 0, 0, 30
    for salt in range(trials):
        world({"gpt+dyt": Truth(gain=1.25, best=2.0)}, salt=salt, bowl=0.2)
        g = compare(tiny(), tiny("gpt+dyt"), store=store, budget="solid").rows[1].against.gains["flop"]
        covered += 1.25 in g.interval
        sure += 1 not in g.interval
    assert covered >= 0.95 * trials - 3 * math.sqrt(0.95 * 0.05 * trials)
    assert sure > 0.9 * trials


def test_x_against_its_twin_reads_one(tiny, store, world):
    """alibi's truth is X's own here: only the noise differs."""
    covered, said, trials = 0, [], 40
    for salt in range(trials):
        world({"gpt+alibi": Truth()}, salt=salt, bowl=0.2)
        found = compare(tiny(), tiny("gpt+alibi"), store=store).rows[1].against
        covered += 1.0 in found.gains["flop"].interval
        said.append(found.verdict.outcome)
    assert covered >= 0.95 * trials - 3 * math.sqrt(0.95 * 0.05 * trials)
    assert said.count(Outcome.BETTER) + said.count(Outcome.WORSE) <= 0.05 * trials + 3 * math.sqrt(0.05 * trials)
    assert not compare(tiny(), tiny("gpt+alibi"), store=store).to_json()["earlier"]


def test_x_against_itself_reads_exactly_one(tiny, store, world):
    made = world({})
    c = compare(tiny(), tiny(), store=store)
    found = c.rows[1].against
    gain = found.gains["flop"]
    assert (gain.value, gain.interval.low, gain.interval.high) == (1, 1, 1)
    assert found.verdict.outcome is Outcome.EQUIVALENT and c.equivalent.outcome == "supported at this scale"
    assert [row.name for row in c.rows] == ["gpt", "gpt (2)"]
    assert len({job.id for job in made.trained}) == len(made.trained)


def test_claims_read_the_second_recipe(tiny, store, world):
    world({"gpt+dyt": Truth(gain=2.0), "gpt+alibi": Truth(gain=0.6)}, sd=0.005)
    good, bad = (compare(tiny(), tiny(y), store=store) for y in ("gpt+dyt", "gpt+alibi"))
    assert [v.outcome for v in (good.better, good.no_worse)] == ["supported at this scale"] * 2
    assert good.equivalent.outcome == "opposite at this scale"
    assert [v.outcome for v in (bad.better, bad.no_worse, bad.equivalent)] == ["opposite at this scale"] * 3
    assert good.better.estimate < 0 and good.better.unit == "bits per byte"
    assert "parameters" in good.better.scale and "tokens" in good.better.scale
    smoke = compare(tiny(), tiny("gpt+dyt"), store=store, budget="smoke")
    assert smoke.rows[1].against.verdict.outcome is Outcome.NO_VERDICT
    assert {v.outcome for v in (smoke.better, smoke.no_worse, smoke.equivalent)} == {"inconclusive"}


def test_noise_excuses_no_difference_that_is_seen(tiny, tmp_path, world):
    """A noisy arm has a wide margin of equivalence; where it is worse all the same, it is not 'no worse'."""
    hidden = 0
    for salt in range(8):
        world({"gpt+dyt": Truth(gain=0.4)}, sd=0.12, salt=salt)
        c = compare(tiny(), tiny("gpt+dyt"), store=Store(tmp_path / str(salt)))
        found = c.rows[1].against
        if found.difference.interval.low > asked_margin(SLOPE):
            assert c.no_worse.outcome == c.equivalent.outcome == "opposite at this scale"
            hidden += found.difference.interval.low < found.verdict.margin
    assert hidden


def test_an_edge_extends_every_arm_alike(tiny, store, world):
    made = world({"gpt+dyt": Truth(best=16.0)}, bowl=0.2, sd=0.001)
    x, y = compare(tiny(), tiny("gpt+dyt"), store=store).rows
    assert x.tuned.sweep.factors == y.tuned.sweep.factors == (*FACTORS, 8.0, 16.0, 32.0)
    assert y.tuned.lr_scale == pytest.approx(16, rel=0.05) and x.tuned.lr_scale == pytest.approx(1, rel=0.05)
    tuning = [job for job in made.trained if job.seed == TUNING_SEED and job.steps == STEPS]
    assert len(tuning) == 2 * 8


def test_an_edge_beyond_reach_is_said(tiny, store, world):
    world({"gpt+dyt": Truth(best=1e4)}, bowl=0.2, sd=0.001)
    c = compare(tiny(), tiny("gpt+dyt"), store=store)
    assert len(c.rows[1].tuned.sweep.factors) == len(FACTORS) + 3
    assert c.to_json()["rows"][1]["strip"]["at_edge"] and not c.to_json()["rows"][0]["strip"]["at_edge"]


def test_divergence_is_an_outcome(tiny, store, world):
    world({"gpt+dyt": Truth(gain=3.0, diverges=lambda job: job.seed == 2), "gpt+alibi": Truth(gain=2.0)}, sd=0.003)
    c = compare(tiny(), tiny("gpt+dyt"), tiny("gpt+alibi"), store=store)
    broken, whole = c.rows[1], c.rows[2]
    assert broken.diverged == 1 and len(broken.scores) == 5
    assert broken.against.verdict.outcome is Outcome.INCONCLUSIVE
    assert broken.against.gains["flop"].position is Position.DIVERGED
    assert whole.against.verdict.outcome is Outcome.BETTER
    assert json.dumps(c.to_json(), allow_nan=False)
    always = {"gpt+dyt": Truth(diverges=lambda job: True)}
    world(always)
    quick = compare(tiny(), tiny("gpt+dyt"), store=store)
    assert quick.rows[1].against.sentence("nats") == "worse (diverged in 5 of 5 pairs, the first recipe in 0)"
    lost = compare(tiny(), tiny("gpt+dyt"), store=store, budget="solid")
    assert lost.rows[1].against.verdict.outcome is Outcome.WORSE
    assert lost.no_worse.outcome == "opposite at this scale"


def test_a_hot_rate_that_diverges_is_only_left_out(tiny, store, world):
    world({"gpt+dyt": Truth(diverges=lambda job: job.lr_scale > 1.5)}, bowl=0.2, sd=0.001)
    row = compare(tiny(), tiny("gpt+dyt"), store=store).rows[1]
    assert row.tuned.sweep.diverged == 2 and row.tuned.lr_scale == 1 and row.diverged == 0


def test_a_ladder_that_diverges_leaves_the_verdict(tiny, store, world):
    world({"gpt": Truth(diverges=lambda job: job.steps == 2 * STEPS), "gpt+dyt": Truth(gain=2.0)}, sd=0.003)
    c = compare(tiny(), tiny("gpt+dyt"), store=store)
    assert c.rows[1].against.verdict.outcome is Outcome.BETTER and not c.rows[1].against.gains
    assert "diverged" in c.to_json()["ladder"]["missing"]


def test_no_ladder_no_gain(tiny, store, world):
    made = world({"gpt+dyt": Truth(gain=2.0)})
    c = compare(tiny(), tiny("gpt+dyt"), store=store, ladder="off")
    assert {job.steps for job in made.trained} == {STEPS} and not c.rows[1].against.gains
    assert c.rows[1].against.verdict.outcome is Outcome.BETTER


def test_many_candidates_are_adjusted_together(tiny, store, world):
    world({"gpt+dyt": Truth(gain=1.15), "gpt+alibi": Truth(), "gpt+rope": Truth()}, salt=3)
    words = ("gpt+dyt", "gpt+alibi", "gpt+rope")
    alone = compare(tiny(), tiny(words[0]), store=store).rows[1].against
    together = [r.against for r in compare(tiny(), *map(tiny, words), store=store).rows[1:]]
    assert together[0].difference.interval == alone.difference.interval
    assert together[0].difference.p == min(a.difference.p for a in together)
    assert together[0].adjusted_p == pytest.approx(3 * alone.difference.p)
    assert together[0].detectable > alone.detectable


def test_looking_until_it_is_clear(tiny, store, world):
    made = world({"gpt+dyt": Truth(gain=2.0)}, sd=0.003)
    c = compare(tiny(), tiny("gpt+dyt"), store=store, pairs="until-clear")
    assert len(c.rows[0].scores) == 4 and c.rows[1].against.difference.interval.level == 0.99
    made.trained.clear()
    world({"gpt+dyt": Truth(gain=1.07)}, sd=0.02, salt=5)
    c = compare(tiny(), tiny("gpt+dyt"), store=store, pairs="until-clear")
    assert len(c.rows[0].scores) in (8, 12)


def test_the_red_tag(tiny, store, world):
    world({"gpt+dyt": Truth(gain=1.1, best=2.5)}, bowl=0.2, sd=0.001)
    found = compare(tiny(), tiny("gpt+dyt"), store=store).rows[1].against
    assert found.flips
    world({"gpt+dyt": Truth(gain=2.0)}, sd=0.001)
    assert not compare(tiny(), tiny("gpt+dyt"), store=store).rows[1].against.flips


def test_gains_in_three_units(tiny, store, world):
    world({}, sd=0.001)
    wide = tiny().put("model.stack.block.mlp.widen", 16)
    row = compare(tiny(), wide, store=store).rows[1]
    gains, ratio = row.against.gains, row.tuned.arm.flops_per_step / tiny_flops(tiny)
    assert gains["flop"].value == pytest.approx(math.exp(row.against.difference.mean / SLOPE), rel=0.1)
    assert gains["token"].value / gains["flop"].value == pytest.approx(ratio, rel=1e-9)
    assert gains["second"].interval.low < gains["second"].value < gains["second"].interval.high


def tiny_flops(tiny) -> int:
    from deltax.lab.measure import flops_per_step

    return flops_per_step(tiny())


def test_a_second_knob_costs_every_arm_the_same(tiny, store, world, monkeypatch):
    from deltax.parts.training.optimizers import sgd

    monkeypatch.setattr(sgd, "second_knob", "momentum", raising=False)
    made = world({"gpt+dyt": Truth()})
    y = tiny("gpt+dyt").put("optimizer", sgd)
    x_row, y_row = compare(tiny(), y, store=store, ladder="off").rows
    assert y_row.tuned.knob == "momentum" and y_row.tuned.second.factors == (0.5, 1.0, 2.0)
    assert x_row.tuned.knob is None
    tuning = [job.recipe.title for job in made.trained if job.seed == TUNING_SEED]
    assert abs(tuning.count("gpt") - tuning.count("gpt+dyt")) <= 1  # one centre may be had already


def test_again_it_trains_nothing_and_writes_nothing(tiny, store, monkeypatch):
    events = []
    words = dict(store=store, budget="1k tokens", pairs=2, engine="inline")
    first = compare(tiny(), tiny("gpt+alibi"), **words)
    monkeypatch.setattr(Store, "remember", lambda *_: pytest.fail("the store has it all"))
    again = compare(tiny(), tiny("gpt+alibi"), **words, on_event=events.append)
    kinds = {event.kind for event in events[1:]}
    assert kinds == {"reused"}
    a, b = first.to_json(), again.to_json()
    for timed in ("plan", "environment", "spent"):
        a.pop(timed), b.pop(timed)
    assert a == b
    assert np.isfinite(first.rows[1].scores).all() and first.rows[0].scores != first.rows[1].scores
    assert store.records("comparison") and len(store.records("noise")) == 1


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        (["gpt"], {}, "at least two recipes"),
        (["gpt", "gpt+dyt"], {"budget": "qick"}, "did you mean 'quick'"),
        (["gpt", "gpt+dyt"], {"budget": "0s"}, "cannot read the budget"),
        (["gpt", "gpt+dyt"], {"budget": "1flops"}, "buys no step of gpt"),
        (["gpt", "gpt+dyt"], {"pairs": 1}, "2 or more pairs"),
        (["gpt", "gpt+dyt"], {"ladder": "no"}, "on or off"),
    ],
)
def test_what_cannot_be_compared(tiny, store, words, settings, says):
    with pytest.raises(UserError, match=says):
        compare(*map(tiny, words), store=store, **settings)


def test_recipes_on_different_data(tiny, store):
    with pytest.raises(UserError, match="different data"):
        compare(tiny(), tiny("gpt+dyt").put("task.context", 8), store=store)


def test_the_data_can_be_given(tiny, store, world, tmp_path):
    world({"gpt+dyt": Truth()})
    other = Path(tmp_path / "other.txt")
    other.write_text("a small text, repeated with numbers " + " ".join(map(str, range(3000))))
    c = compare(tiny(), tiny("gpt+dyt"), store=store, data=str(other), ladder="off")
    assert "other.txt" in c.scale and f"--data {other}" in c.to_json()["command"]
