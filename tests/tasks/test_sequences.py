"""Strings and their reversals: written out by hand, disjoint from what is held out, padded at the end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltax.errors import UserError
from deltax.tasks.language.sequences import END, PADDING, START, ZERO, Batch, Reversal


def digits(tokens: torch.Tensor) -> list[int]:
    return [t - ZERO for t in tokens.tolist() if t >= ZERO]


def is_held_out(string: list[int]) -> bool:
    return sum(place * digit for place, digit in enumerate(string, 1)) % 7 == 0


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**64 - 1), st.integers(1, 13))
def test_targets_are_the_source_backwards(step, seed, longest):
    batch = Reversal(digits=longest).batch(step, size=7, seed=seed)
    assert batch.source.shape == (7, longest) and batch.inputs.shape == batch.targets.shape == (7, longest + 1)
    for source, inputs, targets in zip(*batch, strict=True):
        string = digits(source)
        assert 1 <= len(string) <= longest and all(0 <= digit <= 9 for digit in string)
        rest = longest - len(string)
        assert source.tolist() == [ZERO + d for d in string] + [PADDING] * rest
        said = [ZERO + d for d in reversed(string)]
        assert targets.tolist() == [*said, END] + [-100] * rest
        assert inputs.tolist() == [START, *said] + [PADDING] * rest
        assert not is_held_out(string)


def test_a_batch_depends_on_step_size_and_seed_alone():
    task = Reversal()
    one = task.batch(2, size=5, seed=3)
    for mine, other in zip(one, Reversal().batch(2, size=9, seed=3), strict=True):
        assert torch.equal(mine, other[:5])
    assert not torch.equal(one.source, task.batch(3, size=5, seed=3).source)
    assert not torch.equal(one.source, task.batch(2, size=5, seed=4).source)


def test_every_length_and_digit_is_trained_on():
    batch = Reversal(digits=6).batch(0, size=6000, seed=0)
    lengths = torch.bincount((batch.source != PADDING).sum(1), minlength=7)
    assert lengths[0] == 0 and (lengths[1:] - 1000).abs().max() < 150
    seen = torch.bincount(batch.source[batch.source >= ZERO] - ZERO, minlength=10)
    assert len(seen) == 10 and (seen / seen.sum() - 0.1).abs().max() < 0.02
    assert Reversal(digits=6).tokens(6000) == pytest.approx(int((batch.targets >= 0).sum()), rel=0.02)


def test_held_out_strings_are_long_fixed_and_never_trained_on():
    task = Reversal(digits=5, held_out=50)
    one, other = (torch.cat([b.source for b in task.held_out_batches(size)]) for size in (7, 100))
    assert torch.equal(one, other) and len(one) == 50 and len(task.held_out_documents()) == 50
    assert all(len(digits(row)) == 5 and is_held_out(digits(row)) for row in one)
    sealed = torch.cat([b.source for b in task.held_out_batches(50, "sealed")])
    assert not torch.equal(one, sealed)


def test_exact_match_asks_for_every_token_and_the_end():
    task = Reversal(held_out=10)

    class Model(torch.nn.Linear):
        wrong = 0

        def greedy(self, source, start, length):
            assert start == START and length == 13
            said = torch.cat([source.flip(1), source.new_full((len(source), 1), END)], 1)
            said[: self.wrong, -1] = ZERO
            return said

    model = Model(1, 1)
    assert task.exact_match(model) == 1.0
    model.wrong = 3
    objective = lambda model, batch: torch.ones(len(batch.source))
    assert task.evaluate(model, objective).metrics == {"exact match": pytest.approx(0.7)}
    assert task.evaluate(torch.nn.Linear(1, 1), objective).metrics == {}


def test_pieces_and_weights():
    batch = Reversal(digits=4).batch(0, size=5, seed=0)
    assert [len(piece.source) for piece in batch.pieces(2)] == [3, 2]
    assert batch.weights().tolist() == [len(digits(row)) + 1 for row in batch.source]
    assert isinstance(batch.to("meta"), Batch) and batch.to("meta").targets.device.type == "meta"


def test_fingerprint_and_bad_arguments():
    assert len({Reversal(digits=d, held_out=h).fingerprint for d, h in ((3, 5), (4, 5), (3, 6))}) == 3
    assert Reversal().task_spec == {"vocab": 13, "context": 13} and Reversal().score(0.5) == 0.5
    for wrong in ({"digits": 0}, {"digits": 2.5}, {"held_out": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Reversal(**wrong)
    with pytest.raises(UserError, match="did you mean 'sealed'"):
        next(Reversal().held_out_batches(4, "seeled"))
