"""A + B against A times B, on runs whose losses are known."""

import math

import pytest
from fake_runs import Truth

from deltax.errors import UserError
from deltax.lab.interact import interact
from deltax.lab.store import Store
from deltax.papers.language.norm.dyt import dyt
from deltax.papers.language.position.alibi import alibi


def truths(together: float) -> dict[str, Truth]:
    return {"gpt+dyt": Truth(gain=1.2), "gpt+alibi": Truth(gain=1.15), "gpt+dyt+alibi": Truth(gain=together)}


@pytest.mark.parametrize(
    ("together", "says"), [(1.2 * 1.15 * 1.3, "more than"), (1.1, "less than"), (1.2 * 1.15, "the product, within")]
)
def test_the_contrast_is_recovered(tiny, store, world, together, says):
    world(truths(together), sd=0.0005)
    found = interact(tiny(), dyt, tiny("gpt+alibi"), store=store, budget="claim")
    assert found.outcome.startswith(says) and str(found).startswith("gpt+dyt+alibi against gpt+dyt times gpt+alibi")
    low, high = found.interval
    # The three gains share X's best rate, and each arm's own is found only to the noise of one seed.
    assert low * 0.98 < together / (1.2 * 1.15) < high * 1.02
    assert found.to_json()["interaction"]["ratio"] == pytest.approx(math.exp(found.contrast.mean))


def test_a_noisy_contrast_is_inconclusive(tiny, tmp_path, world):
    outcomes = []
    for salt in range(8):
        world(truths(1.2 * 1.15 * 1.02), sd=0.02, salt=salt)
        outcomes.append(interact(tiny(), dyt, alibi, store=Store(tmp_path / str(salt))).outcome)
    unclear = [o for o in outcomes if o.startswith("inconclusive (could have seen a factor of")]
    assert len(unclear) >= 6, "95 % intervals miss now and then, but not this often"


@pytest.mark.parametrize(("together", "says"), [(9.0, "more than the sum"), (0.2, "less than the sum")])
def test_beyond_the_ladder_losses_are_contrasted(tiny, store, world, together, says):
    world(truths(together), sd=0.0005)
    found = interact(tiny(), dyt, alibi, store=store)
    low, high = found.interval
    assert found.outcome == says and "beyond the ladder" in str(found) and "bits per byte" in str(found)
    # The shared ladder is one straight line in ln compute: -0.23 nats per e-fold.
    assert low - 0.01 < -0.23 * math.log(together / (1.2 * 1.15)) < high + 0.01
    written = found.to_json()["interaction"]
    assert written["difference"] == pytest.approx(found.contrast.mean) and "ratio" not in written


def test_a_run_that_diverged_is_not_contrasted(tiny, store, world):
    world({**truths(1.2), "gpt+dyt+alibi": Truth(diverges=lambda job: job.seed == 2)}, sd=0.001)
    with pytest.raises(UserError, match="a run diverged"):
        interact(tiny(), dyt, alibi, store=store)


def test_what_cannot_be_contrasted(tiny, store, world):
    with pytest.raises(UserError, match="adds nothing"):
        interact(tiny(), tiny(), "alibi", store=store)
    with pytest.raises(UserError, match="leave it on"):
        interact(tiny(), dyt, alibi, store=store, ladder="off")
    world({**truths(1.0), "gpt": Truth(diverges=lambda job: job.steps > 40)}, sd=0.001)
    with pytest.raises(UserError, match="diverged"):
        interact(tiny(), dyt, alibi, store=store)
