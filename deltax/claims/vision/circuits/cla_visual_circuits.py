"""Claims of cla-visual-circuits: the paper's equations, parity with peers, and what it measures."""

from itertools import combinations, pairwise
from typing import Any

import torch
from torch import nn

from deltax import claim
from deltax.claims.checking import randomise
from deltax.papers.vision.backbones.resnet import resnet
from deltax.papers.vision.circuits.cla_visual_circuits import (
    Circuit,
    _pooled,
    activity,
    attribution,
    cla_visual_circuits,
    most_active,
    removed,
    settle,
    stitched,
    total,
)
from deltax.shapes import Images


@claim
def between_linear_layers_it_is_the_weight():
    """From one linear layer to the next a score is the mean activation times the size of the weight, whatever the
    pictures' size."""
    torch.manual_seed(0)
    net = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))).eval()
    images = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    [found] = attribution(activity(net, images, ("0", "1")))
    amount = net[0](images).mean((2, 3)).abs().mean(0)
    torch.testing.assert_close(found, amount[:, None] * net[1].weight[:, :, 0, 0].T.abs())


@claim
def a_score_says_what_a_small_push_does():
    """Moving the whole map of a neuron by a little moves the next layer's neurons by the score over its activation."""
    net, images, layers = _tiny()
    scores = attribution(activity(net, images[:1], layers))
    for i, (name, table) in enumerate(zip(layers, scores, strict=False)):
        plain = [_pooled(x)[0].detach() for x in activity(net, images[:1], layers)]
        m = int(table.sum(1).argmax())
        shift = 1e-6 * torch.eye(table.shape[0], dtype=torch.float64)[m][None, :, None, None]
        hook = net.get_submodule(name).register_forward_hook(lambda module, args, out, shift=shift: out + shift)
        moved = [_pooled(x)[0].detach() for x in activity(net, images[:1], layers)]
        hook.remove()
        pushed = (moved[i + 1] - plain[i + 1]).abs() / 1e-6 * plain[i][m].abs()
        torch.testing.assert_close(table[m], pushed, rtol=1e-4, atol=1e-7)
        assert table[m].max() > 1e-3


@claim
def between_two_layers_no_sweep_loses():
    """With two layers no sweep lowers the total, sweeps end by themselves at no more than the best circuit of all, and
    naming the neurons otherwise names the circuit otherwise and changes nothing else."""
    torch.manual_seed(0)
    reached = 0
    for _ in range(12):
        table = torch.rand(7, 5, dtype=torch.float64) ** 4
        start = tuple(tuple(sorted(torch.randperm(n)[:2].tolist())) for n in (7, 5))
        kept, totals, settled = settle([table], start)
        assert settled and all(b >= a for a, b in pairwise(totals)) and totals[-1] == total([table], kept)
        best = max(total([table], (a, b)) for a in combinations(range(7), 2) for b in combinations(range(5), 2))
        assert totals[-1] <= best + 1e-12
        reached += totals[-1] > best - 1e-12
        order = torch.randperm(7)
        renamed = tuple(sorted(order.argsort()[list(start[0])].tolist())), start[1]
        again, *_ = settle([table[order]], renamed)
        assert tuple(sorted(order[list(again[0])].tolist())) == kept[0] and again[1] == kept[1]
    assert 1 < reached < 12


@claim
def what_is_removed_is_gone():
    """Removing no neuron changes no logit, to the bit; removing a whole layer leaves nothing of the picture; removing a
    circuit leaves none of its activity and no hook behind."""
    net, images, layers = _tiny()
    plain = net(images)
    with removed(net, layers, ((),) * len(layers)):
        assert torch.equal(net(images), plain)
    with removed(net, layers[:1], (tuple(range(4)),)):
        blank = net(images)
    torch.testing.assert_close(blank, blank[:1].expand_as(blank))
    circuit = cla_visual_circuits(net, images, layers, share=0.5)
    with removed(net, layers, circuit.neurons):
        for x, gone in zip(activity(net, images, layers), circuit.neurons, strict=True):
            assert gone and len(gone) == round(x.shape[1] / 2) and not _pooled(x)[:, list(gone)].any()
        assert not torch.allclose(net(images), plain)
    assert not any(m._forward_hooks for m in net.modules()) and torch.equal(net(images), plain)


LAYERS = ("backbone.stem", "backbone.stages.0", "backbone.stages.1", "backbone.stages.2")


@claim.measured(paper="circuits causally affect what the model says (abstract)")
def without_its_circuit_a_digit_is_lost(lab):
    """With the circuit of a digit taken out, a quarter of each layer, fewer of its held-out pictures are told than
    without random circuits of that size, by at least 10 points."""
    found = [_taken_out(lab, seed) for seed in lab.seeds(3)]
    gains = [f["% right, random"] - f["% right, circuit"] for f in found]
    return lab.at_least(gains, 10.0, unit="points", numbers=_columns(found))


@claim.measured(paper="circuits are of a concept: others are affected less (section 4)")
def the_other_digits_lose_less(lab):
    """Taking the circuit of a digit out costs its own held-out pictures more accuracy than those of the others."""
    found = [_taken_out(lab, seed) for seed in lab.seeds(3)]
    gains = [f["% right of others, circuit"] - f["% right, circuit"] for f in found]
    return lab.at_least(gains, 0.0, unit="points", numbers=_columns(found))


@claim.measured(paper="circuits causally affect what the model says (abstract)")
def the_circuit_is_more_than_what_is_most_active(lab):
    """Taking out the circuit costs a digit's held-out pictures more accuracy than taking out as many neurons of each
    layer that are the most active."""
    found = [_taken_out(lab, seed) for seed in lab.seeds(3)]
    gains = [f["% right, most active"] - f["% right, circuit"] for f in found]
    return lab.at_least(gains, 0.0, unit="points", numbers=_columns(found))


@claim.measured(paper="what is said of stitched images is made of the circuits of both parts (abstract, CatFish)")
def a_stitched_picture_holds_both_circuits(lab):
    """The circuit of two digits side by side shares more neurons with those two digits' circuits than with others'."""
    gains = []
    for seed in lab.seeds(3):
        run = lab.train("resnet", seed=seed)
        shown = _shown(run.task)
        circuits = [set(_named(cla_visual_circuits(run.model, x, LAYERS))) for x in shown]
        shared = []
        for a, b in ((d, (d + 3) % 10) for d in range(10)):
            both = set(_named(cla_visual_circuits(run.model, stitched(shown[a], shown[b]), LAYERS)))
            overlap = [100 * len(both & circuit) / len(both) for circuit in circuits]
            own, others = (overlap[a] + overlap[b]) / 2, [o for d, o in enumerate(overlap) if d not in (a, b)]
            shared.append(own - sum(others) / len(others))
        gains.append(sum(shared) / len(shared))
    return lab.at_least(gains, 0.0, unit="% of neurons")


@claim.measured(paper="sweeps go on until the circuit stops changing (section 3)")
def sweeps_of_a_deep_network_rarely_lose(lab):
    """Through four layers, where a sweep looks to one side only, fewer than 5 % of sweeps lower the total."""
    losing, rounds, settled = [], [], []
    for seed in lab.seeds(3):
        run = lab.train("resnet", seed=seed)
        circuits = [cla_visual_circuits(run.model, x, LAYERS) for x in _shown(run.task)]
        steps = [b < a * (1 - 1e-6) for c in circuits for a, b in pairwise(c.totals)]
        losing.append(100 * sum(steps) / len(steps))
        rounds.append(max(len(c.totals) // 2 for c in circuits))
        settled.append(sum(c.settled for c in circuits))
    numbers = {"rounds at most": rounds, "circuits of 10 that settled": settled}
    return lab.at_most(losing, 5.0, unit="% of sweeps", numbers=numbers)


def _shown(task: Any, each: int = 8) -> list[Images]:
    """The first training pictures of every digit."""
    images, labels = task.all("train")
    return [images[labels == digit][:each] for digit in range(10)]


def _named(circuit: Circuit) -> list[tuple[int, int]]:
    return [(layer, neuron) for layer, chosen in enumerate(circuit.neurons) for neuron in chosen]


@torch.no_grad()
def _taken_out(lab: Any, seed: int) -> dict[str, float]:
    """Held-out accuracy of a digit, and of the others, with its circuit and with other neurons taken out; a mean over
    digits, in percent."""
    run = lab.train("resnet", seed=seed)
    images, labels = run.task.all()
    generator, rows = torch.Generator().manual_seed(0), []
    for digit, shown in enumerate(_shown(run.task)):
        circuit = cla_visual_circuits(run.model, shown, LAYERS)
        maps = activity(run.model, shown, LAYERS)
        ways = {"nothing": ((),) * len(LAYERS), "circuit": circuit.neurons, "most active": most_active(maps, 0.25)}
        draw = lambda maps=maps: tuple(
            tuple(torch.randperm(x.shape[1], generator=generator)[: round(0.25 * x.shape[1])].tolist()) for x in maps
        )
        ways |= {f"random {i}": draw() for i in range(3)}
        row, own = {}, labels == digit
        for name, neurons in ways.items():
            with removed(run.model, LAYERS, neurons):
                right = (run.model(images).argmax(-1) == labels).double()
            row[f"% right, {name}"] = 100 * right[own].mean().item()
            row[f"% right of others, {name}"] = 100 * right[~own].mean().item()
        for kind in ("% right", "% right of others"):
            row[f"{kind}, random"] = sum(row.pop(f"{kind}, random {i}") for i in range(3)) / 3
        rows.append(row)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _columns(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [f[name] for f in found] for name in found[0]}


def _tiny() -> tuple[nn.Module, Images, tuple[str, ...]]:
    """A small resnet in float64 with random weights and statistics, at rest; three images; its layers."""
    recipe = resnet.put("model.backbone.stem_width", 4).put("model.backbone.widths", (4, 6))
    model = randomise(recipe.put("model.backbone.depths", (1, 1))().build({"channels": 2, "classes": 5}))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(std=0.3)
    return model.eval(), torch.randn(3, 2, 8, 8, dtype=torch.float64), LAYERS[:3]
