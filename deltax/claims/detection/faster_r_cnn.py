"""Claims of faster-r-cnn: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor

from deltax import claim
from deltax.papers.detection.fast_r_cnn import fast_r_cnn
from deltax.papers.detection.faster_r_cnn import RPN, faster_r_cnn
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.detection.boxes import (
    IGNORED,
    NOTHING,
    anchor_grid,
    assign,
    iou,
    rescue,
)
from deltax.parts.detection.detector import Proposals, truth
from deltax.shapes import Images, Maps
from deltax.tasks.detection.scenes import draw


@claim
def knows_no_place():
    """Moving the image by one stride moves what the network says of the anchors by one cell, away from the border."""
    torch.manual_seed(0)
    model = (r_cnn + fast_r_cnn + faster_r_cnn)["model"](channels=1, classes=3).double().eval()
    wide = torch.randn(1, 1, 64, 68, dtype=torch.float64)

    def said(images: Images) -> list[Tensor]:
        scores, offsets, *_ = model.proposals(model.maps(images), images).said
        return [t.view(16, 16, -1)[5:11, 5:10] for t in (scores, offsets)]

    for here, moved in zip(said(wide[..., 4:]), said(wide[..., :-4]), strict=True):
        torch.testing.assert_close(moved[:, 1:], here[:, :-1], rtol=1e-9, atol=1e-12)


@claim
def corners_carry_no_gradient():
    """The classifier's loss does not reach the offsets of the proposals that it was given; the network's own does."""
    torch.manual_seed(0)
    model = (r_cnn + fast_r_cnn + faster_r_cnn)["model"](channels=1, classes=3).double()
    images, boxes = torch.randn(2, 1, 32, 32, dtype=torch.float64), torch.tensor([[[4.0, 4, 12, 16]]] * 2).double()
    said = model(images, boxes, torch.ones(2, 1, dtype=torch.bool))
    moves = model.proposals.offsets.weight
    assert torch.autograd.grad(said.logits.sum(), moves, retain_graph=True, allow_unused=True)[0] is None
    loss = model.proposals.loss(said.proposals, boxes, torch.ones(2, 1, dtype=torch.bool))
    assert torch.autograd.grad(loss.sum(), moves)[0].abs().max() > 0


@claim
def every_object_has_an_anchor():
    """An object that no anchor overlaps by 0.7 is answered for by the anchor that overlaps it most, if any does."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16]], dtype=torch.float64)
    boxes = torch.tensor([[6.0, 0, 16, 4], [1, 1, 8, 8], [50, 50, 60, 60]], dtype=torch.float64)
    overlaps, real = iou(anchors[:, None], boxes), torch.ones(3, dtype=torch.bool)
    found = assign(overlaps, real, low=0.3, high=0.8)
    assert found.tolist() == [IGNORED, IGNORED, NOTHING]
    assert rescue(found, overlaps, real).tolist() == [1, 0, NOTHING]


@claim
def small_errors_count_by_beta():
    """Of an anchor's offset with an error of e, the box loss has e^2 / (2 beta) up to e = beta and e - beta / 2 beyond;
    with beta = 1 that is Fast R-CNN's smooth L1, with beta = 0 the plain L1."""
    recipe, error = r_cnn + fast_r_cnn + faster_r_cnn, torch.tensor([0.01, 0.1, 0.5, 3.0], dtype=torch.float64)
    anchors = boxes = torch.tensor([[4.0, 4, 12, 16]]).double()
    for beta in (1.0, 1 / 9, 0.0):
        rpn = recipe.set(RPN, beta=beta)["model.proposals"](8)
        said = torch.full((1, 1), 500.0).double(), error.expand(1, 1, 4), anchors, (32, 32)
        loss = rpn.loss(
            Proposals(boxes[None], torch.ones(1, 1, dtype=torch.bool), said), boxes[None], torch.ones(1, 1) > 0
        )
        square = error.square() / (2 * beta) if beta else torch.inf * error
        torch.testing.assert_close(loss.sum(), torch.where(error < beta, square, error - beta / 2).sum())


@claim.measured(paper="300 proposals reach 69.9 mAP on VOC 2007, selective search with 2000 reaches 66.9 (Table 3)")
def finds_nearly_all(lab):
    """Of the objects of held-out scenes, more than 95 % have an IoU of 0.5 with one of its best 50 proposals."""
    runs = [lab.train("r-cnn+fast-r-cnn+faster-r-cnn", seed=seed) for seed in lab.seeds(3)]
    batch = next(runs[0].task.held_out_batches(8))
    figure = draw(batch.images, runs[0].model.detect(batch.images), batch)
    shown = {"Held-out scenes: what was found, and, dashed, what is there": lab.figure(figure)}
    return lab.at_least([_recall(run, run.model.proposals) for run in runs], 0.95, unit="recall", figures=shown)


@claim.measured(paper="300 proposals reach 69.9 mAP on VOC 2007, selective search with 2000 reaches 66.9 (Table 3)")
def better_than_windows(lab):
    """Its best 49 proposals find more of the objects than 49 windows do, spread evenly and of the usual size."""

    def windows(maps: list[Maps], images: Images, strides: tuple[int, ...]) -> Proposals:
        boxes = anchor_grid(7, 7, images.shape[-1] / 7, sides=(10.0,), ratios=(1.4,)).expand(len(images), -1, -1)
        return Proposals(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))

    runs = [lab.train("r-cnn+fast-r-cnn+faster-r-cnn", seed=seed) for seed in lab.seeds(3)]
    gains = [_recall(run, run.model.proposals, 49) - _recall(run, windows) for run in runs]
    return lab.at_least(gains, 0.0, unit="recall")


@claim.measured(paper="69.9 mAP on VOC 2007 against 66.9 with selective search (Table 3)")
def no_worse_than_with_windows(lab):
    """The detector's AP50 is at most 3 points below that of Fast R-CNN with 128 windows an image."""
    gaps = []
    for seed in lab.seeds(3):
        recipes = ("r-cnn+fast-r-cnn+faster-r-cnn", "r-cnn+fast-r-cnn")
        ours, theirs = (lab.train(recipe, seed=seed).evaluation.metrics.get("AP50", 0.0) for recipe in recipes)
        gaps.append(ours - theirs)
    return lab.at_least(gaps, -0.03, unit="AP50")


@torch.inference_mode()
def _recall(run, source, most: int = 50) -> float:
    """The share of held-out objects that one of the first `most` proposals overlaps by 0.5."""
    hit, count = 0, 0
    for batch in run.task.held_out_batches(64):
        boxes, real = truth(batch, batch.images)
        proposals = source(run.model.maps(batch.images), batch.images, run.model.maps.strides)
        overlaps = iou(proposals.boxes[:, :most, None], boxes[:, None]).where(proposals.real[:, :most, None], 0.0)
        hit, count = hit + int((overlaps.amax(1) >= 0.5)[real].sum()), count + int(real.sum())
    return hit / count
