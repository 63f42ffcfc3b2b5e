"""Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks. Ren, He, Girshick, Sun, 2015.
arXiv:1506.01497

Fast R-CNN, but the proposals come from a small network on the shared map, which scores and moves anchors.

Once regions share a map, finding them elsewhere is what takes the time. A 3 x 3 convolution looks at every cell and
says of each anchor there whether it is an object and how far off; the best of them, after suppression, are the
proposals. One sigmoid an anchor stands for the paper's softmax of two. All losses are minimised at once, with no
gradient through the corners of a proposal (section 3.2, "approximate joint training"); the box loss is divided by the
sampled anchors, as in released code, which at the paper's sizes is its lambda = 10 over 2400 positions. The paper's
smooth L1 is Fast R-CNN's, square up to an error of one; released code squares only up to 1/9 here (sigma = 3, as
does torchvision), detectron2 nowhere: `RPN(beta=...)`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper
from deltax.papers.detection.fast_r_cnn import fast_r_cnn
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.boxes import (
    IGNORED,
    NOTHING,
    Detections,
    anchor_grid,
    assign,
    centred,
    clip,
    decode,
    encode,
    iou,
    of_found,
    rescue,
    sample,
    suppress,
)  # fmt: skip
from deltax.parts.detector import Proposals, by_cell, grids, truth
from deltax.parts.precision import at_least_float32
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.scenes import draw


class RPN(nn.Module):
    """Maps -> the `most` likeliest boxes of each image. `before` of them come to the suppression (section 3.1, 3.3).

    `beta` is the error at which the box loss turns from a square into a straight line.

    A batch of images learns from `count` anchors each, at most half of them an object's: its best anchor's, or of IoU
    0.7 on. Background is below 0.3; what lies between, or crosses the border, is left out.
    """

    def __init__(
        self, width: int, *, anchors: Part, hidden: int = 64, most: int = 50, before: int = 150,
        count: int = 64, beta: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if not beta >= 0:
            raise UserError(f"the box loss is square up to an error of at least 0, not {beta}; set beta to 1.0")
        self.anchors = anchors()
        self.conv = nn.Conv2d(width, hidden, 3, padding=1)
        self.objectness = nn.Conv2d(hidden, self.anchors.count, 1)
        self.offsets = nn.Conv2d(hidden, 4 * self.anchors.count, 1)
        self.most, self.before, self.count, self.beta = most, before, count, beta
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.conv, self.objectness, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Maps], images: Images, strides: tuple[int, ...] = ()) -> Proposals:
        anchors = torch.cat(self.anchors(grids(maps, images, strides), images.device))
        hidden = [torch.relu(self.conv(m)) for m in maps]
        scores = torch.cat([by_cell(self.objectness(h), 1) for h in hidden], 1)[..., 0]
        offsets = torch.cat([by_cell(self.offsets(h), 4) for h in hidden], 1)
        with torch.no_grad():
            boxes, real = self._best(scores, clip(decode(offsets, anchors), *images.shape[-2:]))
        return Proposals(boxes, real, (scores, offsets, anchors, images.shape[-2:]))

    def _best(self, scores: Float[Tensor, "B S"], boxes: Float[Tensor, "B S 4"]) -> tuple[Tensor, Tensor]:
        """The boxes left after suppression, the likeliest first, of at least a pixel each way."""
        take = lambda t, index: t.gather(1, index[..., None].expand(-1, -1, 4))
        odds, index = at_least_float32(scores).sigmoid().topk(min(self.before, scores.shape[1]))
        boxes = take(boxes, index)
        odds = odds.where((boxes[..., 2:] - boxes[..., :2] >= 1).all(-1), 0.0)
        odds, index = suppress(Detections(odds, torch.zeros_like(index), centred(boxes)), 0.7).scores.topk(
            min(self.most, odds.shape[1])
        )
        return take(boxes, index), odds > 0

    def loss(self, proposals: Proposals, boxes: Float[Tensor, "B M 4"], real: Bool[Tensor, "B M"]) -> PerExample:
        scores, offsets, anchors, (rows, columns) = proposals.said
        inside = (anchors == clip(anchors, rows, columns)).all(-1)
        overlaps = iou(anchors[:, None], boxes[:, None]).where(inside[:, None], 0.0)
        found = rescue(assign(overlaps, real, low=0.3, high=0.7), overlaps, real).where(inside, IGNORED)
        mine = found >= 0
        chosen = sample(mine, found == NOTHING, self.count, 0.5)
        scores, offsets = at_least_float32(scores), at_least_float32(offsets)
        goal = encode(of_found(boxes, found, 0.0), anchors).to(offsets.dtype)
        error = nn.functional.smooth_l1_loss(offsets, goal, beta=self.beta, reduction="none").sum(-1)
        miss = nn.functional.binary_cross_entropy_with_logits(scores, mine.to(scores.dtype), reduction="none")
        total = miss.where(chosen, 0.0) + error.where(chosen & mine, 0.0)
        return total.sum(1) / chosen.sum(1).clamp(min=1)


@paper(on=fast_r_cnn, year=2015, arxiv="1506.01497", whole="r-cnn+fast-r-cnn")
def faster_r_cnn(recipe: Part, *, most: int = 50) -> Part:
    return recipe.fill("proposals", RPN, most=most)


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
