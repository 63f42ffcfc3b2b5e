"""End-to-End Object Detection with Transformers. Carion, Massa, Synnaeve, Usunier, Kirillov, Zagoruyko, 2020.
arXiv:2005.12872

A transformer on the maps of a ResNet, but its decoder says a set: learned queries answer all at once, and each is
matched to at most one object.

No anchors, no overlapping proposals, no suppression. The Hungarian algorithm pairs queries with objects, the loss is
taken under that pairing after every decoder layer, and a query left over is to say "no object"; queries see each
other, so they can divide the scene among them. Where things stand is added to queries and keys in every layer, never
to values. The paper trains 6 + 6 layers of width 256 with 100 queries for 500 epochs from a pretrained backbone with
frozen batch norm; the default here learns small scenes from nothing, so its batch norm learns too.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.contract import IMAGES_TO_OBJECTS, needs
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention
from deltax.papers.language.models.transformer import sinusoids, transformer
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.resnet import resnet
from deltax.parts.attention.context import Context
from deltax.parts.attention.scores import everywhere
from deltax.parts.detection.boxes import Detections, corners, giou, of_found
from deltax.parts.model.convolution import SmallStem
from deltax.parts.model.language_model import Embedding
from deltax.parts.model.linear import XavierLinear
from deltax.parts.model.stack import Stack
from deltax.parts.numerics.precision import at_least_float32
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Features, Images, PerExample
from deltax.tasks.detection.coco import CocoScenes
from deltax.tasks.detection.scenes import Batch


class Predictions(NamedTuple):
    """What each query says after each of L decoder layers: class logits, no object last, and a box (cx, cy, w, h)."""

    logits: Float[Tensor, "L B N V"]
    boxes: Float[Tensor, "L B N 4"]


class DetectionHead(nn.Module):
    """Of the normed stream, class logits by a linear map and a box by three. (..., D) -> (..., V + 1), (..., 4)."""

    def __init__(self, dim: int, classes: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(dim)
        self.classes = XavierLinear(dim, classes + 1)
        self.box = nn.ModuleList([XavierLinear(dim, dim), XavierLinear(dim, dim), XavierLinear(dim, 4)])

    def forward(self, x: Features) -> tuple[Float[Tensor, "*B V"], Float[Tensor, "*B 4"]]:
        x = self.norm(x)
        first, second, last = self.box
        return self.classes(x), last(torch.relu(second(torch.relu(first(x))))).sigmoid()


class DETR(nn.Module):
    """Images (B, C, Y, X) -> `Predictions` of N queries (Figure 2). `channels` and `classes` are the task's."""

    interface = IMAGES_TO_OBJECTS

    def __init__(
        self, channels: int, classes: int, *, dim: int, queries: int, backbone: Part, encoder: Part, decoder: Part,
        detection_head: Part = part(DetectionHead),
    ):  # fmt: skip
        super().__init__()
        if dim % 4:
            raise UserError(f"a width of {dim} is no multiple of 4, for sines and cosines of rows and columns; set dim")
        self.backbone = backbone(channels)
        self.project = nn.Conv2d(self.backbone.width, dim, 1)
        self.queries = Embedding(queries, dim, std=1.0)
        self.encoder = encoder(dim)
        self.decoder = decoder(dim)
        self.detection_head = detection_head(dim, classes)

    def forward(self, images: Images) -> Predictions:
        maps = self.project(self.backbone(images))
        places = grid_sinusoids(*maps.shape[-2:], maps.shape[1], maps.device).to(maps.dtype)[None]
        memory = self.encoder(maps.flatten(2).mT, Context(pos_embed=places))
        queries = self.queries.weight.expand(len(images), -1, -1)
        ctx = Context(pos_embed=queries, memory=memory, memory_pos_embed=places)
        after = torch.stack(list(self.decoder.each(torch.zeros_like(queries), ctx)))
        return Predictions(*self.detection_head(after))

    def detect(self, images: Images, layer: int = -1) -> Detections:
        """Each query's likeliest class, its probability, and its box, after a decoder layer. Images -> (B, N) each."""
        logits, boxes = (at_least_float32(t[layer]) for t in self(images))
        return Detections(*logits.softmax(-1)[..., :-1].max(-1), boxes)


def grid_sinusoids(rows: int, columns: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "S D"]:
    """Half of the features are the row's sinusoids, half the column's, counted up to 2 pi. Float64 (Y X, D)."""
    count = lambda n: (torch.arange(1, n + 1, device=device, dtype=torch.float64) / (n + 1e-6)) * 2 * math.pi
    row, column = sinusoids(count(rows), dim // 2), sinusoids(count(columns), dim // 2)
    both = row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)
    return torch.cat(both, -1).flatten(0, 1)


@torch.no_grad()
def match(cost: Float[Tensor, "B N M"], real: Bool[Tensor, "B M"]) -> Int[Tensor, "B N"]:
    """For each query the object that the cheapest one-to-one assignment gives it, or -1 (Eq. 1).

    Objects that are not real take no part. Raises UserError where a scene has more objects than queries.
    """
    most, queries = int(real.sum(1).max()), cost.shape[1]
    if most > queries:
        raise UserError(
            f"a scene has {most} objects and the model {queries} queries; set model.queries to at least {most}"
        )
    matched = np.full(cost.shape[:2], -1)
    costs = torch.nan_to_num(cost.double(), nan=1e30, posinf=1e30, neginf=-1e30).cpu().numpy()
    for i, objects in enumerate(real.cpu().numpy()):
        objects = objects.nonzero()[0]
        chosen, columns = linear_sum_assignment(costs[i][:, objects])
        matched[i, chosen] = objects[columns]
    return torch.from_numpy(matched).to(cost.device)


def matching_cost(
    said: Predictions, batch: Batch, *, l1: float = 5.0, overlap: float = 2.0
) -> Float[Tensor, "L B N M"]:
    """-p(class) + `l1` * |box - box'|_1 - `overlap` * GIoU of every query and object (section 3.1)."""
    count = said.logits.shape[2]
    label = batch.labels.clamp(min=0)[None, :, None].expand(len(said.logits), -1, count, -1)
    ours, theirs = said.boxes[..., None, :], batch.boxes[None, :, None]
    distance = (ours - theirs).abs().sum(-1)
    return -said.logits.softmax(-1).gather(-1, label) + l1 * distance - overlap * giou(corners(ours), corners(theirs))


def set_loss(
    said: Predictions, batch: Batch, *, no_object: float = 0.1, l1: float = 5.0, overlap: float = 2.0
) -> PerExample:
    """The sum over decoder layers of cross-entropy, L1 and 1 - GIoU under the cheapest matching (Eq. 2), of each scene.

    The mean over the batch is the paper's loss: boxes count per object of the whole batch, and classes by a weighted
    mean over its queries, in which no object weighs `no_object`. A scene's share needs only `batch.objects` of the
    others.
    """
    layers, scenes, queries, _ = said.logits.shape
    real = (batch.labels >= 0).repeat(layers, 1)
    cost = matching_cost(said, batch, l1=l1, overlap=overlap)
    matched = match(cost.flatten(0, 1), real).view(layers, scenes, queries)
    found, truth = matched >= 0, of_found(batch.boxes, matched, 0.0)
    distance = (said.boxes - truth).abs().sum(-1)
    apart = 1 - giou(corners(said.boxes), corners(truth))
    box_loss = torch.where(found, l1 * distance + overlap * apart, 0.0).sum(2) / batch.objects.clamp(min=1e-6)
    return (class_loss(said.logits, matched, batch.labels, batch.objects, no_object=no_object) + box_loss).sum(0)


def class_loss(
    logits: Float[Tensor, "L B N V"], matched: Int[Tensor, "L B N"], labels: Int[Tensor, "B M"], objects: PerExample,
    *, no_object: float = 0.1,
) -> Float[Tensor, "L B"]:  # fmt: skip
    """Each scene's share of the mean of the cross-entropy over queries, in which those that are to say no object weigh
    `no_object`."""
    _, _, queries, classes = logits.shape
    found = matched >= 0
    label = of_found(labels, matched, classes - 1)
    each = nn.functional.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view_as(label)
    objects = objects.to(each.dtype)
    return torch.where(found, each, no_object * each).sum(2) / (objects + no_object * (queries - objects))


@needs("images", "boxes", "labels", "objects", model=IMAGES_TO_OBJECTS)
def set_prediction(
    model: nn.Module, batch: Batch, *, no_object: float = 0.1, l1: float = 5.0, overlap: float = 2.0
) -> PerExample:
    """`set_loss` of what the model says of the images."""
    said = Predictions(*(at_least_float32(t) for t in model(batch.images)))
    return set_loss(said, batch, no_object=no_object, l1=l1, overlap=overlap)


@paper(on=(transformer, resnet), year=2020, arxiv="2005.12872")
def detr(*, dim: int = 64, depth: int = 2, heads: int = 4, queries: int = 6) -> Part:
    coder = lambda name: (
        transformer[f"model.{name}"].set(Stack, depth=depth).set(Attention, heads=heads, mask=everywhere)
    )
    model = part(
        DETR,
        dim=dim,
        queries=queries,
        backbone=part(
            resnet["model.backbone"], stem=part(SmallStem, stride=2), stem_width=32, widths=(32, 64), depths=(1, 1)
        ),
        encoder=coder("encoder"),
        decoder=coder("decoder").set(CrossAttention, heads=heads),
    )
    return part(
        Run,
        model=model,
        task=part(CocoScenes, size=24, most=2, classes=4),
        objective=set_prediction,
        batches=from_task,
        optimizer=part(adamw, lr=1e-3, weight_decay=1e-4),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=2000, max_grad_norm=0.1),
    )
