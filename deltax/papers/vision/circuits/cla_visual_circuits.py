"""Automatic Discovery of Visual Circuits. Rajaram, Chowdhury, Torralba, Andreas, Schwettmann, 2024. arXiv:2404.14349

All neurons of a network may serve a concept, but each layer's k with the largest attribution form its circuit.

A neuron is a channel, averaged over its map. The attribution from m to n in the next layer is |a_m| |da_n / da_m|,
averaged over a few images of the concept. The circuit starts with the k most active neurons of each layer. A backward
sweep keeps, in each layer, the k neurons with the largest summed attribution to the kept neurons above; a forward
sweep, the k with the largest from those below; sweeps repeat until nothing changes. Removing the circuit tests it. It
is attribution patching's product of activation and gradient, but between neighbouring layers, not to the output. The
code was not released; ties, the start and the stopping rule are chosen here.
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
from deltax.shapes import Images

Scores = Float[Tensor, "_ _"]  # (neurons of a layer, neurons of the next)
Neurons = tuple[tuple[int, ...], ...]  # indices in each layer, ascending


class Circuit(NamedTuple):
    """The neurons of each layer that serve a concept.

    layers   names of modules, in execution order
    neurons  channels of each
    totals   the summed attribution inside the circuit, at the start and after every sweep
    settled  whether a last round of sweeps changed nothing
    """

    layers: tuple[str, ...]
    neurons: Neurons
    totals: tuple[float, ...]
    settled: bool


@paper(year=2024, arxiv="2404.14349")
def cla_visual_circuits(
    model: nn.Module, images: Images, layers: tuple[str, ...], *, share: float = 0.25, rounds: int = 50
) -> Circuit:
    """The circuit for what a few images show, with a `share` of each layer's neurons, at least one. See `activity`."""
    if not 0 < share <= 1 or len(layers) < 2:
        raise UserError(
            f"a circuit takes at least two layers, not {len(layers)}, and a share in (0, 1], not {share}; set both"
        )
    maps = activity(model, images, tuple(layers))
    start = most_active(maps, share)
    neurons, totals, settled = settle(attribution(maps), start, rounds=rounds)
    return Circuit(tuple(layers), neurons, tuple(totals), settled)


@torch.enable_grad()
def attribution(maps: list[Float[Tensor, "B _ *_"]]) -> list[Scores]:
    """|a_m| |da_n / da_m| from each layer to the next, averaged over images.

    a_n is a channel's mean; da_m shifts the whole map of m.
    """
    tables = []
    for below, above in pairwise(maps):
        rows = []
        # one backward pass per neuron of the upper layer
        for n in range(above.shape[1]):
            (slope,) = torch.autograd.grad(_pooled(above)[:, n].sum(), below, retain_graph=True)
            slope = slope.flatten(2).sum(-1) if slope.ndim > 2 else slope
            # (neurons of the lower layer,)
            rows.append((_pooled(below) * slope).abs().mean(0).detach())
        tables.append(torch.stack(rows, 1))
    return tables


def settle(scores: list[Scores], start: Neurons, *, rounds: int = 50) -> tuple[Neurons, list[float], bool]:
    """Sweeps backward and forward from `start` until a round changes nothing, or `rounds` times.

        scores  the attribution from each layer to the next

    Returns the neurons of each layer, the total at the start and after each sweep, and whether the last round changed
    nothing. Ties go to the lower index.
    """
    kept, totals = list(start), [total(scores, start)]
    for _ in range(rounds):
        before = list(kept)
        for i in reversed(range(len(scores))):
            # backward: the summed attribution to the kept neurons of layer i + 1
            kept[i] = _most(scores[i][:, list(kept[i + 1])].sum(1), len(kept[i]))
        totals.append(total(scores, tuple(kept)))
        for i, table in enumerate(scores, 1):
            # forward: from the kept neurons of layer i - 1
            kept[i] = _most(table[list(kept[i - 1])].sum(0), len(kept[i]))
        totals.append(total(scores, tuple(kept)))
        if kept == before:
            return tuple(kept), totals, True
    return tuple(kept), totals, False


def total(scores: list[Scores], neurons: Neurons) -> float:
    """The summed attribution between the neurons of neighbouring layers."""
    return sum(s[list(a)][:, list(b)].sum().item() for s, (a, b) in zip(scores, pairwise(neurons), strict=True))


@torch.enable_grad()
def activity(model: nn.Module, images: Images, layers: tuple[str, ...]) -> list[Float[Tensor, "B _ *_"]]:
    """Each layer's output for the images, with its graph.

    Raises UserError for a layer that the model does not have or whose output is not (B, C, ...), and for a model in
    training mode, where batch statistics mix images.
    """
    if model.training:
        raise UserError("the model is in training mode, where batch statistics mix images: call model.eval() first")
    modules, found = dict(model.named_modules()), {}
    for name in layers:
        if name not in modules:
            raise UserError(f"the model has no layer {name!r}{nearest(name, modules)}")
    keep = lambda name: lambda module, args, out: found.update({name: out})
    hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        # pixels get a graph even where all parameters are frozen
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


def most_active(maps: list[Float[Tensor, "B _ *_"]], share: float) -> Neurons:
    """The most active neurons of each layer, by the mean over images of |a_m|."""
    return tuple(_most(_pooled(x).abs().mean(0), max(1, round(share * x.shape[1]))) for x in maps)


@contextmanager
def removed(model: nn.Module, layers: tuple[str, ...], neurons: Neurons) -> Iterator[nn.Module]:
    """A context in which these neurons' outputs are 0."""

    def silence(chosen: tuple[int, ...]) -> Any:
        return lambda module, args, out: out.index_fill(1, torch.tensor(chosen, dtype=torch.int64), 0.0)

    hooks = [model.get_submodule(a).register_forward_hook(silence(b)) for a, b in zip(layers, neurons, strict=True)]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(x: Float[Tensor, "B _ *_"]) -> Float[Tensor, "B _"]:
    return x.flatten(2).mean(-1) if x.ndim > 2 else x


def _most(sums: Float[Tensor, " _"], count: int) -> tuple[int, ...]:
    return tuple(sorted(sums.sort(descending=True, stable=True).indices[:count].tolist()))
