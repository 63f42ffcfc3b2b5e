"""Outer loops in the plain training loop: they train, resume, end at what is shared, and send what they say."""

import threading
from datetime import timedelta

import pytest
import torch
from torch import distributed

from deltax import UserError, part, recipe
from deltax.papers.optimization.local_updates.local_sgd import LocalSteps
from deltax.papers.optimization.local_updates.muloco import TwoBits
from deltax.papers.systems.decentralized.intellect_1 import Int8
from deltax.papers.systems.decentralized.opendiloco import Half
from deltax.papers.systems.decentralized.topk_compression import Remembered, TopK
from deltax.parts.distributed.exchange import Ring, ring_bytes
from deltax.parts.training.stale import Stale
from deltax.train.job import Job
from deltax.train.loop import build, train

RECIPES = [
    "gpt+sgd+local-sgd(workers=2, every=3)",
    "gpt+local-sgd(workers=2, every=3)+nesterov-outer",
    "gpt+diloco(workers=3, every=2)",
    "gpt+diloco(workers=2, every=2)+opendiloco",
    "gpt+diloco(workers=2, every=2)+intellect-1",
    "gpt+diloco(workers=2, every=2)+muloco",
    "gpt+muon+diloco(workers=2, every=2)",
    "gpt+topk-compression(workers=2, keep=0.1)",
    "gpt+async-local-sgd(speeds=[1, 2], every=4)",
    "gpt+async-local-sgd(speeds=[1, 2], every=4)+momentum-lookahead",
    "gpt+async-nesterov-pp(stages=3)",
    "gpt+nesterov",
    "gpt+adamw",
    "gpt+beyond-topk(keep=0.5)",
    "gpt+subspace-networks(rank=6)",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text("".join(f"{i} is half of {2 * i}, and a third of {3 * i}.\n\n" for i in range(2000)))

    def make(expression, *settings, **job):
        sizes = ["model.dim=12", "model.stack.depth=2", "task.context=16", "task.held_out=512", f"task.source={path}"]
        return Job(recipe(expression, [*sizes, "loop.batch=4", *settings]), **{"steps": 17, **job})

    return make


@pytest.mark.parametrize("expression", RECIPES)
def test_a_run_that_dies_in_a_round_goes_on_exactly(tiny, tmp_path, expression):
    class Killed(Exception):
        pass

    def die(progress):
        if progress.step == 9:
            raise Killed

    job, path = tiny(expression), tmp_path / "run.safetensors"
    whole = train(job)
    with pytest.raises(Killed):
        train(job, save_to=path, save_every=0.0, on_step=die)
    resumed = train(job, save_to=path)
    assert [tuple(pair) for pair in resumed.progress.losses] == whole.progress.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert not whole.diverged and resumed.evaluation.score == whole.evaluation.score


@pytest.mark.parametrize(
    "expression", ["gpt+diloco(workers=2, every=5)", "gpt+async-local-sgd(speeds=[1, 2], every=5)"]
)
def test_it_learns(tiny, expression):
    losses = [loss for _, loss in train(tiny(expression, steps=120)).progress.losses]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10


def test_a_run_ends_at_what_is_shared(tiny):
    """In the middle of a round too: then the workers meet once more."""
    seen = []

    class Watched(LocalSteps):
        def eval(self):
            super().eval()
            seen.append((self.taken, [torch.equal(a, b) for a, b in zip(self.weights, self.shared, strict=True)]))

    globals()["_Watched"] = Watched
    Watched.__qualname__, Watched.__module__ = "_Watched", __name__
    job = tiny("gpt")
    for steps in (12, 14):
        this = job.recipe.wrap("optimizer", Watched, workers=3, every=2)
        train(Job(this, steps=steps))
    assert [taken for taken, _ in seen] == [[4, 4, 4], [5, 5, 4]]
    assert all(all(same) for _, same in seen)


def test_a_late_pipeline_ends_at_its_newest_weights(tiny):
    model = build(tiny("gpt").recipe(), tiny("gpt").recipe["task"](), 0)
    optimizer = Stale(model, inner=tiny("gpt").recipe["optimizer"], stages=3)
    assert set(optimizer.delays) == {0, 1, 2} and optimizer.delays == sorted(optimizer.delays, reverse=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    newest = optimizer.versions[0][-1]
    assert not torch.equal(optimizer.weights[0], newest)
    optimizer.eval()
    assert torch.equal(optimizer.weights[0], newest)


EXCHANGES = {
    "exact": part(Ring),
    "half": part(Ring, code=part(Half)),
    "int8": part(Ring, code=part(Int8)),
    "top-k": part(Remembered, code=part(TopK, keep=0.2)),
    "two bits": part(Remembered, code=part(TwoBits, block=8)),
}


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("workers", [2, 3])
def test_a_process_group_finds_the_mean_of_one_process(name, workers):
    """Two exchanges in a row, so that what was remembered counts; the same numbers, and the same bytes."""
    torch.manual_seed(0)
    vectors = torch.randn(2, workers, 101)
    together = EXCHANGES[name]()
    together.prepare(workers, vectors[0, 0])
    expected = [together.among(dict(enumerate(v))) for v in vectors]
    store, found = distributed.HashStore(), {}

    def work(rank):
        group = distributed.ProcessGroupGloo(store, rank, workers, timedelta(seconds=20))
        exchange = EXCHANGES[name]()
        exchange.prepare(1, vectors[0, 0])
        found[rank] = [exchange.over(group, v[rank]) for v in vectors], exchange.sent

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(workers))
    for means, sent in found.values():
        assert sent == together.sent
        for mean, wanted in zip(means, expected, strict=True):
            torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=1e-7)


def test_bytes_of_a_whole_run_are_the_closed_form(tiny):
    job = tiny("gpt+diloco(workers=4, every=3)", steps=24)
    model = build(job.recipe(), job.recipe["task"](), 0)
    optimizer = job.recipe["optimizer"](model)
    for _ in range(24):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.exchange.sent == 2 * ring_bytes(sum(p.numel() for p in model.parameters()), 4)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("gpt+local-sgd(workers=0)", "workers of LocalSteps is at least 1, not 0"),
        ("gpt+local-sgd(every=0)", "every of LocalSteps is at least 1, not 0"),
        ("gpt+async-local-sgd(speeds=[1, 0])", "speeds are above 0"),
        ("gpt+muloco", "write gpt\\+diloco\\+muloco"),
        ("gpt+opendiloco", "no slot 'code'"),
        ("gpt+topk-compression(keep=0)", "share of entries"),
        ("gpt+beyond-topk(keep=2)", "share of columns"),
        ("gpt+subspace-networks(rank=13)", "rank must be 1 to 12, .* not 13"),
        ("gpt+async-nesterov-pp(stages=1000)", "cannot be cut into 1000 stages"),
        ("gpt+momentum-lookahead", "no slot 'outer'"),
    ],
)
def test_mistakes_are_one_sentence(tiny, expression, says):
    with pytest.raises(UserError, match=says):
        train(tiny(expression, steps=1))
