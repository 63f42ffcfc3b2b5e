"""The plan: budgets, resolution, names, the command."""

import dataclasses
import math
import shlex

import pytest

from deltax import recipe
from deltax.errors import UserError
from deltax.expression import recipe as read
from deltax.lab import plan
from deltax.lab.plan import Calibration, make_plan, pair_seeds
from deltax.lab.statistics import detectable


@pytest.fixture
def calm(monkeypatch):
    monkeypatch.setattr(plan, "calibrate", lambda x: Calibration(0.05, 0.2, 0.0))


@pytest.mark.parametrize(
    ("asked", "amount", "unit"),
    [
        ("2e12flops", 2e12, "flops"),
        ("2 TFLOPs", 2e12, "flops"),
        ("300k tokens", 3e5, "tokens"),
        ("1.5M tokens", 1.5e6, "tokens"),
        ("60s", 60, "seconds"),
        ("2 min", 120, "seconds"),
        ("1h", 3600, "seconds"),
    ],
)
def test_budgets_as_they_are_written(asked, amount, unit):
    assert plan._read(asked) == (amount, unit)


@pytest.mark.parametrize("asked", ["", "quikc", "60", "-1s", "s", "5 apples", "1e400 tokens s"])
def test_budgets_that_are_none(asked):
    with pytest.raises(UserError, match="60s, 2e12flops or 300k tokens"):
        plan._read(asked)


def test_seconds_are_converted_once(tiny, store):
    flops = plan._flops(tiny(), store)
    first = plan.freeze("3s", tiny(), Calibration(0.01, 0.1, 0.0), store)
    later = plan.freeze("3s", tiny(), Calibration(0.09, 0.1, 0.0), store)
    assert first == later and first.unit == "flops"
    assert first.amount == pytest.approx(300 * flops, rel=0.05)


def test_named_budgets_are_shares_of_the_recipes_own_steps(tiny, store, calm):
    steps = {name: make_plan([tiny(), tiny("gpt+dyt")], store, budget=name).x.steps for name in plan.EFFORTS}
    assert steps == {"smoke": 30, "quick": 40, "solid": 240, "claim": 480}
    pairs = [make_plan([tiny(), tiny("gpt+dyt")], store, budget=name).pairs for name in plan.EFFORTS]
    assert pairs == [3, 5, 8, 12]


def test_the_resolution_is_the_protocols(tiny, store, calm):
    """PROTOCOL.md A.2.5: at a pair sd of 6 %, 80 % power sees 19, 10, 7 and 5 % with 3, 5, 8 and 12 pairs."""
    two = make_plan([tiny(), tiny("gpt+dyt")], store)
    seen = [math.log(two.resolution(n)) for n in (3, 5, 8, 12)]
    assert seen == pytest.approx([0.19, 0.10, 0.07, 0.05], abs=0.006)
    three = make_plan([tiny(), tiny("gpt+dyt"), tiny("gpt+alibi")], store)
    assert three.resolution(5) == pytest.approx(math.exp(detectable(0.06, 5, level=0.975)))
    said = " ".join(two.sentences())
    assert (
        "with 5 pairs you can see a gain of ≥ 11 %" in said and "12 pairs would see 5.5 %" in said and "pilot" in said
    )
    assert "no verdict" in " ".join(make_plan([tiny(), tiny("gpt+dyt")], store, budget="smoke").sentences())


def test_the_ledgers_noise_replaces_the_pilots(tiny, store, calm):
    x = make_plan([tiny(), tiny("gpt+dyt")], store).x
    entry = {"of": "a", "data": plan.fingerprint(tiny()), "flops": x.flops, "df": 4, "sd": 0.02}
    for i, change in enumerate([{}, {"sd": 0.04, "df": 8}, {"data": "other"}, {"flops": 9 * x.flops}, {"sd": 0.0}]):
        store.remember("noise", str(i), {**entry, **change})
    noise = make_plan([tiny(), tiny("gpt+dyt")], store).noise
    assert noise.sd == pytest.approx(math.sqrt((4 * 0.02**2 + 8 * 0.04**2) / 12)) and noise.source.startswith(
        "2 earlier"
    )


def test_a_busy_machine_is_said(tiny, store, monkeypatch):
    monkeypatch.setattr(plan, "calibrate", lambda x: Calibration(0.05, 0.2, 64.0))
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 2)
    assert "load average is 64.0 on 2 cores" in make_plan([tiny(), tiny("gpt+dyt")], store).sentences()[-1]


def test_the_duration_counts_every_step_and_evaluation(tiny, store, calm):
    p = make_plan([tiny(), tiny("gpt+dyt")], store, workers=2)
    assert p.steps == 2 * 10 * 40 + 6 * (20 + 80)
    assert p.seconds == pytest.approx((1400 * 0.05 + 32 * 0.2) / 2 + 4 * plan.STARTING)


def test_a_calibration_times_a_step(tiny):
    found = plan.calibrate(tiny())
    assert 0 < found.step < 5 and 0 < found.evaluation < 60


def test_names_tell_recipes_apart(tiny):
    wide = tiny().put("model.dim", 16)
    names = plan._names([tiny(), wide, tiny("gpt+dyt"), tiny()])
    assert len(set(names)) == 4 and names[2] == "gpt+dyt"
    assert plan._names([tiny(), tiny(), tiny()]) == ["gpt", "gpt (2)", "gpt (3)"]


def test_the_tuning_seed_is_never_scored():
    assert plan.TUNING_SEED not in pair_seeds(50) and len(set(pair_seeds(12))) == 12


def test_the_command_says_it_all_again(tiny, store, calm):
    made = make_plan([tiny(), tiny("gpt+dyt(alpha=0.8)")], store, pairs=4, ladder="off")
    line = plan.command(made)
    assert line.startswith("dx compare gpt 'gpt+dyt(alpha=0.8)' --budget quick --pairs 4 --data ")
    assert line.endswith("--ladder off")
    assert read("gpt+dyt(alpha=0.8)") == recipe("gpt+dyt(alpha=0.8)")
    assert "--until-clear" in plan.command(dataclasses.replace(made, looks=(4, 8, 12)))


def test_the_command_makes_the_same_recipes(tiny, store, calm):
    made = make_plan([tiny(), tiny("gpt+dyt(alpha=0.8)")], store)
    words = shlex.split(plan.command(made))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    data = words[words.index("--data") + 1]
    assert "model.dim=8" in settings and not any("source" in s for s in settings)
    for expression, arm in zip(words[2:4], made.arms):
        assert read(expression, [*settings, f"task.source={data}"]) == arm.recipe
