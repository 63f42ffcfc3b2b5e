"""Claims of lecun1989-rerun: the paper's equations, parity with peers, and what it measures."""

import math
from itertools import pairwise

import torch

from deltax import claim
from deltax.claims.optimization.losses.cross_entropy import surprise
from deltax.paper import paper_of
from deltax.papers.vision.backbones.lecun1989_rerun import RUNGS, STOPS, lecun1989_rerun
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.recipe import diff


@claim
def each_rung_is_one_line():
    """Each of the eleven rungs differs from the one below in one line of the recipe, and the lowest is the network of
    1989 itself."""
    ladder = [paper_of(lecun1989_rerun)(rung=i) for i in range(len(RUNGS) + 1)]
    assert ladder[0] == lenet_1989
    for below, above in pairwise(ladder):
        assert len(diff(below, above)) == 1


@claim
def not_a_weight_is_added():
    """Every rung trains the same 9,760 weights of the same shapes, from the same start."""
    shapes = []
    for i in range(len(RUNGS) + 1):
        model = paper_of(lecun1989_rerun)(rung=i)().build({"channels": 1, "size": 16, "classes": 10})
        shapes.append({name: p.shape for name, p in model.named_parameters()})
    assert all(s == shapes[0] for s in shapes) and sum(s.numel() for s in shapes[0].values()) == 9760


@claim
def softmax_does_not_see_a_shared_bias():
    """Starting all output biases at -1 or at 0 gives cross-entropy the same value and the same gradients."""
    torch.manual_seed(0)
    z, labels = torch.randn(3, 10, dtype=torch.float64), torch.tensor([0, 9, 4])
    losses, slopes = [], []
    for bias in (0.0, -1.0):
        at = (z + bias).requires_grad_()
        losses.append(surprise(at, labels))
        slopes.append(torch.autograd.grad(losses[-1].sum(), at)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*slopes)


@claim.measured(paper="82 -> 87 -> 72 -> 43 -> 32 of 2,007 test digits wrong, stop after stop")
def the_ladder_leads_up(lab):
    """On 300 digits, the network of 1989 with all changes but more data reads at least 1 point more of the held-out
    digits than it did in 1989."""
    scores = {name: [_run(lab, rung, seed).score for seed in lab.seeds(3)] for name, rung in STOPS.items() if rung < 11}
    gains = [a - b for a, b in zip(scores["1989"], scores["dropout"], strict=True)]
    figures = {"Held-out error at each stop, % of digits": lab.figure(_ladder(scores))}
    return lab.at_least(gains, 1.0, unit="% error", numbers={"error at each stop": scores}, figures=figures)


@claim.measured(paper="82 -> 87 of 2,007 test digits wrong: cross-entropy alone fits better and reads no better")
def cross_entropy_alone_reads_no_better(lab):
    """By itself, cross-entropy in place of squared error takes less than 1 point off the held-out error."""
    gains = [_run(lab, 0, seed).score - _run(lab, 2, seed).score for seed in lab.seeds(3)]
    return lab.at_most(gains, 1.0, unit="% error")


@claim.measured(paper="more data takes the last stop from 1.59 to 1.25 %, and helps the methods of 1989 as well")
def data_helps_the_methods_of_1989(lab):
    """With the methods of 1989 and nothing else, the held-out error from 100 digits is at least twice that from all."""
    doublings = []
    for seed in lab.seeds(3):
        few, many = (lab.train(lenet_1989.put("task.images", n), seed=seed, steps=23 * n).score for n in (100, 1000))
        doublings.append(math.log2(few / many))
    return lab.at_least(doublings, 1.0, unit="halvings of the error")


def _run(lab, rung: int, seed: int):
    return lab.train(f"lecun1989-rerun(rung={rung})", seed=seed)


def _ladder(scores: dict[str, list[float]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5), layout="constrained")
    axes = figure.subplots()
    for i, each in enumerate(scores.values()):
        axes.plot([i] * len(each), each, "o", color="C0")
    axes.plot([sum(each) / len(each) for each in scores.values()], color="C0")
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel("% wrong")
    axes.set_ylim(bottom=0)
    return figure
