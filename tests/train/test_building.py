"""What a constructor refuses is one sentence, with the recipe, the slot and the value, wherever a run begins."""

import pytest
import torch
from torch import nn

from deltax import UserError, recipe
from deltax.lab import measure
from deltax.papers.optimization.optimizers.muon import Muon
from deltax.train.job import Job
from deltax.train.loop import train
from deltax.train.machine import Machine

SMALL = ("task.context=16", "task.held_out=64", "loop.batch=2")


@pytest.mark.parametrize(
    ("title", "settings", "words"),
    [
        ("gpt(dim=21, heads=3)+rope", (), "a head width of 7 is odd.*at model.stack.block.mixer.qk_position: Rotary"),
        ("gpt(dim=20, heads=3)", (), "20 is not a multiple of 3.*at model.stack.block.mixer.project"),
        ("gpt+megatron", (), "2 ranks do not divide 3 heads.*at model.stack.block.mixer: Split"),
        (
            "gpt+sgd",
            ("optimizer.momentum=-1",),
            r"momentum is at least 0 and below 1, not -1 \(at optimizer: sgd\(momentum=-1\)\)",
        ),
        ("gpt+adamw", ("optimizer.beta1=2",), r"at optimizer: adamw\(.*beta1=2"),
        ("gpt+muon", ("optimizer.momentum=1.5",), r"at optimizer: muon_and_adamw\(.*momentum=1.5"),
        ("gpt+diloco", ("optimizer.inner.decay=-1",), r"at optimizer.inner: adamw\(decay=-1\)"),
    ],
)
@pytest.mark.parametrize("begin", ["train", "plan"])
def test_a_constructors_refusal_is_one_sentence(unchecked, title, settings, words, begin):
    tree = recipe(title, [*SMALL, *settings])
    with pytest.raises(UserError, match=words) as found:
        if begin == "train":
            train(Job(tree, steps=1))
        else:
            measure.Stepper(tree, Machine.here())
    assert str(found.value).startswith(title) and "\n" not in str(found.value)


def test_muon_refuses_what_is_no_matrix():
    """A vector in a group without betas has no singular vectors; it names the shape and the remedy."""
    vector = nn.Parameter(torch.zeros(7))
    for params in ([vector], [{"params": [nn.Parameter(torch.zeros(3, 3)), vector]}]):
        with pytest.raises(UserError, match=r"shape \(7,\).*betas"):
            Muon(params)


def test_muon_takes_a_group_with_only_betas():
    """It moves as torch's AdamW does."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(7)), None
    theirs = nn.Parameter(ours.detach().clone())
    pair = (
        Muon([{"params": [ours], "betas": (0.9, 0.95)}], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    )
    for _ in range(3):
        for optimizer, weight in zip(pair, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (weight.sin().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
