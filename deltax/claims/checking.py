"""What claims share: a small problem to learn, two models compared, a ratio of times judged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltax.claim import Outcome


@torch.no_grad()
def randomise(model: nn.Module, *, std: float = 0.4, seed: int = 0) -> nn.Module:
    """The model in float64, every parameter drawn from N(0, std): nothing is left at a start that hides a mistake."""
    torch.manual_seed(seed)
    for parameter in model.double().parameters():
        parameter.normal_(std=std)
    return model


def same_gradients(ours: Tensor, theirs: Tensor) -> None:
    """Check two outputs, and run backward from both under one random weight: the gradients are then to be compared."""
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient by name, those without one left out."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, and close values under each."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


def small_classifier() -> nn.Module:
    """Five numbers to three classes, in float64, the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss_on_batch(model: nn.Module, batch: int) -> Tensor:
    """A classifier's loss on the `batch`-th of many random batches of nine."""
    draw = torch.Generator().manual_seed(batch)
    x, y = torch.randn(9, 5, generator=draw, dtype=torch.float64), torch.randint(3, (9,), generator=draw)
    return nn.functional.cross_entropy(model(x), y)


def faster(ratio: Any, least: float) -> Outcome:
    """What a `lab.ratio` of times says of the claim that it is at least `least`; below 1 it is the opposite."""
    if ratio.low > least:
        return "supported at this scale"
    if ratio.high < 1:
        return "opposite at this scale"
    return "not seen at this scale" if ratio.high < least else "inconclusive"
