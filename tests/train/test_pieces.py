"""A batch cut into pieces has the gradient of the whole, or its recipe declares why not."""

import warnings

import pytest
import torch
from all_meshes import job, sample, trained
from torch.overrides import TorchFunctionMode

from deltax import kernels
from deltax.lab.worker import result_of
from deltax.parts.objectives import mixing
from deltax.parts.steps import moving, one_step
from deltax.train import mesh
from deltax.train.job import task_of
from deltax.train.loop import accumulate, build, train
from deltax.train.machine import Machine

DRAWS = {"rand", "randn", "randint", "rand_like", "randn_like"}


class AlikeForAll(TorchFunctionMode):
    """Every random draw is the same for each of `count` examples, whatever the others are."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in DRAWS or self.count not in drawn.shape:
            return drawn
        axis = drawn.shape.index(self.count)
        one = [1 if i == axis else n for i, n in enumerate(drawn.shape)]
        fresh = torch.Generator().manual_seed(7)
        if drawn.is_floating_point():
            make = torch.randn if "randn" in func.__name__ else torch.rand
            return make(one, generator=fresh, dtype=drawn.dtype).expand_as(drawn).clone()
        return torch.zeros_like(drawn)


def gradients(expression, pieces):
    """Loss, gradients and what the step moved, of one batch that does not divide into these pieces."""
    found, many = job(expression).recipe, 32 if "grpo" in expression else 5
    run, task, draws = kernels.fastest(found, torch.device("cpu"))(), task_of(found), AlikeForAll()
    model = build(run, task, 0)
    torch.manual_seed(0)
    batch = run.batches(model, task, 0, size=many, seed=0)

    def ask(engine, work, piece):
        draws.count = len(piece.weights())
        return work(engine, piece)

    with pytest.MonkeyPatch.context() as patched, one_step(moving(model)), draws:
        patched.setattr(mesh, "ask", ask)
        loss = accumulate(model, run, batch, pieces, Machine())
    every = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    moved = [b.flatten().float() for b in model.buffers()]
    return loss, torch.cat(every), torch.cat(moved or [torch.zeros(1)])


@pytest.mark.parametrize("expression", sample(trained(), 12))
def test_pieces_have_the_gradient_of_the_whole_batch(expression):
    whole = gradients(expression, 1)
    for pieces in (2, 3):
        found = gradients(expression, pieces)
        close = [
            torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in zip(found, whole, strict=True)
        ]
        if mixing(job(expression).recipe):
            assert not all(close), f"{expression} declares that it mixes examples, and {pieces} pieces do not show it"
        else:
            assert all(close), f"{expression} in {pieces} pieces: {mixing(job(expression).recipe)}"


def test_a_run_in_pieces_that_are_not_the_batch_warns_and_records_it():
    cut = job("lenet-1989+batch-norm", "loop.accumulate=2", steps=1)
    with pytest.warns(UserWarning, match="the 2 pieces of a batch of 4 are not the whole batch: batch norm standard"):
        outcome = train(cut)
    assert result_of(cut, outcome, Machine()).environment["pieces"] == outcome.pieces != ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (job("lenet-1989+batch-norm", steps=1), job("lenet-1989", "loop.accumulate=2", steps=1)):
            assert train(quiet).pieces == ""
