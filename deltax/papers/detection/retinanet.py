"""Focal Loss for Dense Object Detection. Lin, Goyal, Girshick, He, Dollár, 2017. arXiv:1708.02002

A feature pyramid network, but in one stage: each anchor is classified, by a loss that fades out what is easy.

A second stage sees a balanced handful of regions; a first stage sees thousands of anchors, nearly all of them
background and nearly all of those easy. Together their small losses drown the few objects. Focal loss multiplies
cross-entropy by (1 - p)^gamma, so that what is known already weighs nothing, and the last bias starts at a prior of one
object in a hundred, or the first steps would be spent on the background alone. The paper detects with the best 1000
anchors of each level; `detect` takes the best 200 answers of all levels together.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import IMAGES_TO_ANCHORS, needs
from deltax.papers.detection.fpn import Pyramid, fpn
from deltax.papers.detection.r_cnn import r_cnn
from deltax.parts.boxes import IGNORED, Detections, assign, decode, encode, iou, of_found
from deltax.parts.detector import Anchors, by_cell, detections, grids, truth
from deltax.parts.precision import at_least_float32
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.scenes import Scenes, draw


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, elementwise, of targets 0 and 1 (Eq. 5).

    `alpha` weighs the ones and 1 - alpha the zeros; a negative alpha weighs both by 1.
    """
    sign = 2 * targets - 1
    loss = -(torch.sigmoid(-sign * logits) ** gamma) * nn.functional.logsigmoid(sign * logits)
    return loss if alpha < 0 else loss * (targets * alpha + (1 - targets) * (1 - alpha))


class Dense(NamedTuple):
    """Of S anchors (S, 4), corners in pixels: a logit for each class, and offsets."""

    logits: Float[Tensor, "B S V"]
    offsets: Float[Tensor, "B S 4"]
    anchors: Float[Tensor, "S 4"]


class TopConvolutions(nn.Module):
    """Two more levels: a 3 x 3 convolution of stride 2 of the backbone's last map, and another of that one's relu."""

    steps = (2, 2)

    def __init__(self, deepest: int, dim: int):
        super().__init__()
        self.first = nn.Conv2d(deepest, dim, 3, stride=2, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, deepest: Maps, last: Maps) -> list[Maps]:
        x = self.first(deepest)
        return [x, self.second(torch.relu(x))]


class DenseHead(nn.Module):
    """Two towers of 3 x 3 convolutions, for classes and for boxes, the same on all levels (section 4).

    Maps -> logits (B, S, V) that begin at a probability of `prior`, and offsets (B, S, 4), the same for all classes.
    """

    can_be_zero = ("depth",)

    def __init__(self, width: int, classes: int, anchors: int, *, depth: int = 2, prior: float = 0.01):
        super().__init__()
        layer = lambda out: nn.Conv2d(width, out, 3, padding=1)
        self.class_tower, self.box_tower = (nn.ModuleList([layer(width) for _ in range(depth)]) for _ in range(2))
        self.classes, self.offsets = layer(classes * anchors), layer(4 * anchors)
        self.classes_count, self.prior = classes, prior
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classes.bias, math.log(self.prior / (1 - self.prior)))

    def forward(self, maps: list[Maps]) -> tuple[Float[Tensor, "B S V"], Float[Tensor, "B S 4"]]:
        logits, offsets = [], []
        for x in maps:
            says, moves = x, x
            for of_class, of_box in zip(self.class_tower, self.box_tower, strict=True):
                says, moves = torch.relu(of_class(says)), torch.relu(of_box(moves))
            logits.append(by_cell(self.classes(says), self.classes_count))
            offsets.append(by_cell(self.offsets(moves), 4))
        return torch.cat(logits, 1), torch.cat(offsets, 1)


class OneStage(nn.Module):
    """Images -> maps -> what is said of every anchor, a `Dense`. `channels` and `classes` are the task's."""

    interface = IMAGES_TO_ANCHORS

    def __init__(
        self, channels: int, classes: int, *, maps: Part, anchors: Part, dense_head: Part = part(DenseHead)
    ):  # fmt: skip
        super().__init__()
        self.maps, self.anchors = maps(channels), anchors()
        self.dense_head = dense_head(self.maps.width, classes, self.anchors.count)

    def forward(self, images: Images) -> Dense:
        maps = self.maps(images)
        anchors = torch.cat(self.anchors(grids(maps, images, self.maps.strides), images.device))
        return Dense(*self.dense_head(maps), anchors)

    def detect(
        self, images: Images, *, least: float = 0.05, overlap: float = 0.5, before: int = 200, most: int = 20
    ) -> Detections:
        """Boxes of a probability of at least `least`, the `before` likeliest of each image, after suppression."""
        said = self(images)
        odds, index = at_least_float32(said.logits).sigmoid().flatten(1).topk(min(before, said.logits[0].numel()))
        image, rank = (odds > least).nonzero(as_tuple=True)
        anchor, label = (f(index[image, rank], said.logits.shape[-1]) for f in (torch.floor_divide, torch.remainder))
        boxes = decode(said.offsets[image, anchor], said.anchors[anchor])
        return detections(odds[image, rank], label, boxes, image, images, overlap=overlap, most=most)


@needs("images", "boxes", "labels", model=IMAGES_TO_ANCHORS)
def one_stage(model: nn.Module, batch: Any, *, gamma: float = 2.0, alpha: float = 0.25) -> PerExample:
    """Focal loss of every anchor and class and smooth L1 of objects' offsets, over the anchors that are an object's,
    at least 1: those of IoU 0.5 on, where below 0.4 is background (section 4). One for each image."""
    boxes, real = truth(batch, batch.images)
    said = model(batch.images)
    found = assign(iou(said.anchors[:, None], boxes[:, None]), real, low=0.4, high=0.5)
    mine = found >= 0
    logits, offsets = at_least_float32(said.logits), at_least_float32(said.offsets)
    label = of_found(batch.labels, found, 0)
    targets = nn.functional.one_hot(label, logits.shape[-1]) * mine[..., None]
    each = focal(logits, targets.to(logits.dtype), gamma=gamma, alpha=alpha).sum(-1).where(found != IGNORED, 0.0)
    goal = encode(of_found(boxes, found, 0.0), said.anchors).to(offsets.dtype)
    error = nn.functional.smooth_l1_loss(offsets, goal, reduction="none").sum(-1).where(mine, 0.0)
    return (each + error).sum(1) / mine.sum(1).clamp(min=1)


@paper(on=fpn, year=2017, arxiv="1708.02002")
def retinanet(*, dim: int = 32, width: int = 8) -> Part:
    backbone = part(r_cnn["model.regions.backbone"], widths=(width, 2 * width, 4 * width))
    sizes = (8.0, 11.0), (12.0, 15.0), (16.0, 20.0), (24.0, 30.0)
    model = part(
        OneStage,
        maps=part(Pyramid, backbone=backbone, dim=dim, top=TopConvolutions),
        anchors=part(Anchors, sides=sizes),
    )
    return r_cnn.put("model", model).put("objective", part(one_stage)).put("loop.steps", 600)


@claim
def without_focus_it_is_cross_entropy():
    """With gamma = 0 and no alpha, focal loss and its gradient are those of binary cross-entropy."""
    torch.manual_seed(0)
    logits, targets = 9 * torch.randn(99, dtype=torch.float64), (torch.rand(99) < 0.3).double()
    logits.requires_grad_()
    ours = focal(logits, targets, gamma=0.0, alpha=-1.0)
    plain = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    mine, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(mine, theirs)


@claim
def what_is_known_fades():
    """With gamma = 2, an example at p = 0.9 has a hundredth of the cross-entropy's loss, one at 0.968 less than a
    thousandth, and a wrong one at 0.5 at most a quarter (section 3.2); far out, loss and gradient stay finite."""
    p = torch.tensor([0.9, 0.9685, 0.5, 0.1], dtype=torch.float64)
    share = focal(p.logit(), torch.ones(4), alpha=-1.0) / -p.log()
    torch.testing.assert_close(share, (1 - p) ** 2)
    assert share[0] < 0.0101 and share[1] < 0.001 and share[2] <= 0.25
    far = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    loss = focal(far, torch.tensor([1.0, 0.0]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), far)[0].isfinite().all()


@claim
def silence_is_the_first_guess():
    """A new head gives every class at every anchor a probability of about 0.01, so that the background costs little."""
    model = retinanet["model"](channels=1, classes=3)
    odds = model(torch.randn(2, 1, 45, 37)).logits.sigmoid()
    assert (odds - 0.01).abs().max() < 0.001 and odds.shape[1] == len(model(torch.zeros(1, 1, 45, 37)).anchors)


@claim
def no_object_moves_no_box():
    """An empty scene's loss is finite, lowers every logit, and has no gradient in the offsets."""
    torch.manual_seed(0)
    model = retinanet["model"](channels=1, classes=3).double()
    batch = Scenes(classes=3).batch(0, size=2, seed=0)
    empty = batch._replace(images=batch.images.double(), labels=torch.full_like(batch.labels, -1))
    loss = one_stage(model, empty)
    of_classes, of_offsets = torch.autograd.grad(
        loss.sum(), (model.dense_head.classes.bias, model.dense_head.offsets.bias)
    )
    assert loss.isfinite().all() and (of_classes > 0).all() and of_offsets.abs().max() == 0


@claim.parity(peer="transformers sigmoid_focal_loss")
def equals_transformers():
    """The values and gradients of the focal loss with which transformers trains DETR's descendants."""
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss

    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, 7, 5) < 0.2
    ours = focal(logits, targets.double(), gamma=2.0, alpha=0.3).mean(1).sum() / 4
    theirs = sigmoid_focal_loss(logits, targets.double(), num_boxes=4, alpha=0.3, gamma=2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@claim.measured(paper="34.0 AP with focal loss against 31.1 with the best balanced cross-entropy (Table 1 b)")
def better_than_cross_entropy(lab):
    """Of every 500 answers one is an object's; from the same prior, focal loss ends at a higher AP than plain
    cross-entropy."""
    plain = retinanet.set(one_stage, gamma=0.0, alpha=-1.0)
    gains, shown = [], {}
    for seed in lab.seeds(3):
        ours, theirs = lab.train(retinanet, seed=seed), lab.train(plain, seed=seed)
        gains.append(ours.evaluation.metrics.get("AP", 0.0) - theirs.evaluation.metrics.get("AP", 0.0))
        if not shown:
            batch = next(ours.task.held_out_batches(8))
            figure = draw(batch.images, ours.model.detect(batch.images), batch)
            shown = {"Held-out scenes: what was found, and, dashed, what is there": lab.figure(figure)}
    return lab.at_least(gains, 0.0, unit="AP", figures=shown)


@claim.measured(paper="without the prior, cross-entropy diverges (section 5.1)")
def without_the_prior_background_swamps(lab):
    """The first loss of plain cross-entropy is at least 20 times higher when every anchor starts at a probability of a
    half than when it starts at a hundredth."""
    plain = retinanet.set(one_stage, gamma=0.0, alpha=-1.0)
    first = lambda recipe, seed: lab.train(recipe, seed=seed, steps=1).losses[0][1]
    times = [first(plain.set(DenseHead, prior=0.5), seed) / first(plain, seed) for seed in lab.seeds(3)]
    return lab.at_least(times, 20.0, unit="times")
