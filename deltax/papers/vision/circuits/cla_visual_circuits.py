"""Automatic Discovery of Visual Circuits. Rajaram, Chowdhury, Torralba, Andreas, Schwettmann, 2024. arXiv:2404.14349

A convolutional network as it stands, but of each layer only the few neurons are read through which a concept passes.

A neuron is a channel, its map averaged. From m to n of the next layer there passes |a_m| |da_n / da_m|: how much there
is, times how much n heeds it, both of a few pictures of the concept. Begin with the k most active neurons of every
layer; going backward keep in each layer the k that give most to those kept above, going forward the k that get most
from those below, until nothing changes. That such a circuit carries the concept is then tested by taking it out. It is
attribution patching's product of an activation and a gradient, but between neighbouring layers, not to the end. The
code was not released; ties, where to begin and when to stop are chosen here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import UserError, paper
from deltax.errors import nearest
from deltax.papers.vision.backbones.resnet import resnet
from deltax.shapes import Images

Scores = Float[Tensor, "_ _"]  # from a neuron of a layer, a row, to one of the next
Neurons = tuple[tuple[int, ...], ...]  # of each layer, ascending


class Circuit(NamedTuple):
    """The neurons of each layer that a concept passes through.

    layers   names of modules, in the order in which they run
    neurons  channels of each
    totals   the sum of scores inside the circuit, at the start and after every sweep
    settled  whether the sweeps ended by themselves
    """

    layers: tuple[str, ...]
    neurons: Neurons
    totals: tuple[float, ...]
    settled: bool


def settle(scores: list[Scores], start: Neurons, *, rounds: int = 50) -> tuple[Neurons, list[float], bool]:
    """Sweeps backward and forward, from `start` on, until a round of both changes nothing or `rounds` are over.

    scores  those from each layer to the next

    Neurons of each layer, the total at the start and after each sweep, and whether nothing changed any more. Of neurons
    with equal sums the first are kept.
    """
    kept, totals = list(start), [total(scores, start)]
    for _ in range(rounds):
        before = list(kept)
        for i in reversed(range(len(scores))):
            kept[i] = _most(scores[i][:, list(kept[i + 1])].sum(1), len(kept[i]))
        totals.append(total(scores, tuple(kept)))
        for i, table in enumerate(scores, 1):
            kept[i] = _most(table[list(kept[i - 1])].sum(0), len(kept[i]))
        totals.append(total(scores, tuple(kept)))
        if kept == before:
            return tuple(kept), totals, True
    return tuple(kept), totals, False


def total(scores: list[Scores], neurons: Neurons) -> float:
    """The sum of the scores between neurons of neighbouring layers."""
    return sum(s[list(a)][:, list(b)].sum().item() for s, (a, b) in zip(scores, pairwise(neurons), strict=True))


@torch.enable_grad()
def activity(model: nn.Module, images: Images, layers: tuple[str, ...]) -> list[Float[Tensor, "B _ *_"]]:
    """What each layer gives for the images, still joined to each other by their graph.

    Raises UserError for a layer that the model has not, or that gives no maps (B, C, ...), and for a model that trains:
    there one picture may change what is seen of another.
    """
    if model.training:
        raise UserError("a circuit is read from a model at rest: call model.eval() first")
    modules, found = dict(model.named_modules()), {}
    for name in layers:
        if name not in modules:
            raise UserError(f"the model has no layer {name!r}{nearest(name, modules)}")
    keep = lambda name: lambda module, args, out: found.update({name: out})
    hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        model(images.detach().clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if list(found) != list(layers) or not all(isinstance(out, Tensor) and out.ndim > 1 for out in found.values()):
        raise UserError(
            f"the model ran through {', '.join(found) or 'none'} of {', '.join(layers)}, in this order; name layers in "
            f"the order in which they run, each of which gives one tensor (B, C, ...)"
        )
    return list(found.values())


@torch.enable_grad()
def attribution(maps: list[Float[Tensor, "B _ *_"]]) -> list[Scores]:
    """|a_m| |da_n / da_m| from each layer to the next, a mean over images; a_n is a channel's mean, and da_m moves the
    whole map of m."""
    tables = []
    for below, above in pairwise(maps):
        rows = []
        for n in range(above.shape[1]):
            (slope,) = torch.autograd.grad(_pooled(above)[:, n].sum(), below, retain_graph=True)
            slope = slope.flatten(2).sum(-1) if slope.ndim > 2 else slope
            rows.append((_pooled(below) * slope).abs().mean(0).detach())
        tables.append(torch.stack(rows, 1))
    return tables


@paper(on=resnet, year=2024, arxiv="2404.14349")
def cla_visual_circuits(
    model: nn.Module, images: Images, layers: tuple[str, ...], *, share: float = 0.25, rounds: int = 50
) -> Circuit:
    """The circuit of what a few images show, of a `share` of each layer's neurons, at least one. See `activity`."""
    if not 0 < share <= 1 or len(layers) < 2:
        raise UserError("a circuit takes two or more layers and a share of their neurons above 0 and up to 1")
    maps = activity(model, images, tuple(layers))
    start = most_active(maps, share)
    neurons, totals, settled = settle(attribution(maps), start, rounds=rounds)
    return Circuit(tuple(layers), neurons, tuple(totals), settled)


def most_active(maps: list[Float[Tensor, "B _ *_"]], share: float) -> Neurons:
    """The most active neurons of each layer, by the mean over images of |a_m|."""
    return tuple(_most(_pooled(x).abs().mean(0), max(1, round(share * x.shape[1]))) for x in maps)


@contextmanager
def removed(model: nn.Module, layers: tuple[str, ...], neurons: Neurons) -> Iterator[nn.Module]:
    """The model with these neurons at 0, inside a `with`."""

    def silence(chosen: tuple[int, ...]) -> Any:
        return lambda module, args, out: out.index_fill(1, torch.tensor(chosen, dtype=torch.int64), 0.0)

    hooks = [model.get_submodule(a).register_forward_hook(silence(b)) for a, b in zip(layers, neurons, strict=True)]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def stitched(left: Images, right: Images) -> Images:
    """Images side by side, as the paper's CatFish are."""
    return torch.cat([left, right], -1)


def _pooled(x: Float[Tensor, "B _ *_"]) -> Float[Tensor, "B _"]:
    return x.flatten(2).mean(-1) if x.ndim > 2 else x


def _most(sums: Float[Tensor, " _"], count: int) -> tuple[int, ...]:
    return tuple(sorted(sums.sort(descending=True, stable=True).indices[:count].tolist()))
