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
import re
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.contract import IMAGES_TO_OBJECTS, needs
from deltax.papers.language.softmax_attention import Attention, CrossAttention
from deltax.papers.language.transformer import sinusoids, transformer
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.vision.resnet import Backbone, backbone_from_hf, resnet
from deltax.parts.boxes import Detections, corners, giou, iou, of_found, suppress
from deltax.parts.context import Context
from deltax.parts.convolution import SmallStem
from deltax.parts.language_model import Embedding
from deltax.parts.linear import Glorot
from deltax.parts.optimizers import adamw
from deltax.parts.precision import at_least_float32
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.scores import everywhere
from deltax.parts.stack import Stack
from deltax.shapes import Features, Images, PerExample
from deltax.tasks.coco import CocoScenes
from deltax.tasks.scenes import Batch, draw


class Predictions(NamedTuple):
    """What each query says after each of L decoder layers: class logits, no object last, and a box (cx, cy, w, h)."""

    logits: Float[Tensor, "L B N V"]
    boxes: Float[Tensor, "L B N 4"]


class DetectionHead(nn.Module):
    """Of the normed stream, class logits by a linear map and a box by three. (..., D) -> (..., V + 1), (..., 4)."""

    def __init__(self, dim: int, classes: int, *, norm: Part = part(LayerNorm)):
        super().__init__()
        self.norm = norm(dim)
        self.classes = Glorot(dim, classes + 1)
        self.box = nn.ModuleList([Glorot(dim, dim), Glorot(dim, dim), Glorot(dim, 4)])

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
        memory = self.encoder(maps.flatten(2).mT, Context(place=places))
        queries = self.queries.weight.expand(len(images), -1, -1)
        ctx = Context(place=queries, memory=memory, memory_place=places)
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
        optimizer=part(adamw, rate=1e-3, decay=1e-4),
        schedule=cosine,
        loop=part(Loop, batch=16, steps=2000, clip=0.1),
    )


BLOCKS_FROM_HF = (
    (r"self_attn_layer_norm\.", "mixer_residual.norm."),
    (r"(encoder|cross)_attn_layer_norm\.", "cross_residual.norm."),
    (r"final_layer_norm\.", "mlp_residual.norm."),
    (r"self_attn\.", "mixer.project."),
    (r"(encoder|cross)_attn\.", "cross.project."),
    (r"(mlp\.)?fc1\.", "mlp.up."),
    (r"(mlp\.)?fc2\.", "mlp.down."),
    (r"project\.q_proj\.", "project.query."),
    (r"project\.k_proj\.", "project.key."),
    (r"project\.v_proj\.", "project.value."),
    (r"project\.(o|out)_proj\.", "project.out."),
    (r"(residual|head)\.norm\.weight$", r"\1.norm.gain"),
)
_HF = (
    (r"model\.input_projection\.", "project."),
    (r"model\.query_position_embeddings\.", "queries."),
    (r"model\.(en|de)coder\.layers\.(\d+)\.", r"\1coder.blocks.\2."),
    (r"model\.decoder\.layernorm\.", "detection_head.norm."),
    (r"class_labels_classifier\.", "detection_head.classes."),
    (r"bbox_predictor\.layers\.", "detection_head.box."),
    *BLOCKS_FROM_HF,
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` DetrForObjectDetection, on a ResNet of transformers, as that of a `DETR`."""
    inside = "model.backbone.model."
    backbone = backbone_from_hf({k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)})
    ours = {f"backbone.{k}": v for k, v in backbone.items()}
    for name in state.keys() - {k for k in state if k.startswith(inside)}:
        ours[renamed(name, _HF)] = state[name]
    return ours


def renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """The name after every pattern has been replaced, one after the other."""
    for pattern, word in patterns:
        name = re.sub(pattern, word, name)
    return name


@claim
def a_set_has_no_order():
    """Permuting the queries, or the objects of a scene, changes neither the loss nor its gradients."""
    said, batch = _random()
    loss, gradient = _loss_and_gradient(said, batch)
    queries, objects = torch.randperm(7), torch.randperm(5)
    shuffled = Predictions(said.logits[:, :, queries], said.boxes[:, :, queries])
    renamed = batch._replace(boxes=batch.boxes[:, objects], labels=batch.labels[:, objects])
    for other, truth, order in ((shuffled, batch, queries), (said, renamed, slice(None))):
        same, its_gradient = _loss_and_gradient(other, truth)
        torch.testing.assert_close(same, loss)
        for mine, theirs in zip(gradient, its_gradient, strict=True):
            torch.testing.assert_close(mine[:, :, order], theirs)


@claim
def no_assignment_is_cheaper():
    """The matching of 5 objects to 5 and to 7 queries costs what the cheapest of all permutations costs."""
    torch.manual_seed(0)
    for queries in (5, 7):
        cost = torch.randn(3, queries, 5, dtype=torch.float64)
        matched = match(cost, torch.ones(3, 5, dtype=torch.bool))
        for table, chosen in zip(cost, matched, strict=True):
            found = (chosen >= 0).nonzero()[:, 0]
            assert sorted(chosen[found].tolist()) == [0, 1, 2, 3, 4]
            best = min(sum(table[q, i] for i, q in enumerate(order)) for order in permutations(range(queries), 5))
            torch.testing.assert_close(table[found, chosen[found]].sum(), best)


@claim
def an_empty_scene_teaches_silence():
    """Scenes without objects give a finite loss, gradients of the logits that raise "no object" alone, and none of
    the boxes."""
    said, batch = _random()
    empty = batch._replace(labels=torch.full_like(batch.labels, -1), objects=torch.zeros_like(batch.objects))
    loss, (of_logits, of_boxes) = _loss_and_gradient(said, empty)
    assert loss.isfinite().all() and of_boxes.abs().max() == 0
    assert (of_logits[..., -1] < 0).all() and (of_logits[..., :-1] > 0).all()


@claim
def pieces_add_up():
    """Read in pieces, a batch has the loss and the gradients that it has as a whole."""
    said, batch = _random()
    whole, gradient = _loss_and_gradient(said, batch)
    parts = [
        _loss_and_gradient(Predictions(*(t[:, i : i + 1] for t in said)), piece)
        for i, piece in enumerate(batch.pieces(3))
    ]
    torch.testing.assert_close(torch.cat([loss for loss, _ in parts]), whole)
    for i, mine in enumerate(gradient):
        torch.testing.assert_close(torch.cat([g[i] for _, g in parts], 1), mine)


@claim
def overlap_has_its_bounds():
    """GIoU is at most IoU and above -1; two unit squares at a distance of one have -1/3, and boxes that are equal
    have 1."""
    torch.manual_seed(0)
    a, b = corners(torch.rand(2, 999, 4, dtype=torch.float64))
    assert (giou(a, b) <= iou(a, b) + 1e-12).all() and (giou(a, b) > -1).all()
    torch.testing.assert_close(giou(a, a), torch.ones_like(a[:, 0]))
    squares = torch.tensor([[0.0, 0, 1, 1], [2, 0, 3, 1]])
    torch.testing.assert_close(giou(*squares), torch.tensor(-1 / 3))


@claim
def places_are_not_values():
    """What stands where changes who looks where, not what is seen: without content, all places give all queries the
    same."""
    torch.manual_seed(0)
    model = detr().build({"channels": 1, "classes": 3}).double().eval()
    nn.init.zeros_(model.project.weight)
    layer = model.encoder.blocks[0].mixer
    blank = model.project.bias.detach().expand(1, 12, -1)
    places = grid_sinusoids(3, 4, blank.shape[-1])
    mixed = layer(blank, Context(place=places[None]))
    torch.testing.assert_close(mixed, layer(blank, Context()))


@claim.parity(peer="transformers DetrForObjectDetection")
def equals_transformers():
    """The same random weights give transformers' logits, boxes, set loss and gradients, to 1e-9 in float64."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    shape = dict(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], num_channels=2)
    backbone = ResNetConfig(**shape, out_features=["stage2"], layer_type="basic")
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=24,
        encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=96,
        decoder_ffn_dim=96, num_queries=7, num_labels=4, dropout=0.0, num_channels=2,
    )  # fmt: skip
    theirs = DetrForObjectDetection(config).double().requires_grad_(True)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith(("running_var", "normalization.weight"))
            tensor.copy_(0.5 + torch.rand_like(tensor) if positive else torch.randn_like(tensor) * 0.25)
    tree = detr.put("model.backbone", part(Backbone, stem_width=6, widths=(8, 12), depths=(1, 2)))
    tree = tree.set(DETR, dim=24, queries=7).set(Attention, heads=3).set(CrossAttention, heads=3)
    tree = tree.put("model.decoder.depth", 3)
    ours = tree().build({"channels": 2, "classes": 4}).double().eval()
    counts = {k: v for k, v in ours.state_dict().items() if k.endswith("num_batches_tracked")}
    ours.load_state_dict(from_hf(theirs.state_dict()) | counts)

    _, batch = _random()
    images = torch.randn(3, 2, 53, 47, dtype=torch.float64)
    said, peer = ours(images), theirs(images)
    torch.testing.assert_close(said.logits[-1], peer.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said.boxes[-1], peer.pred_boxes, rtol=1e-9, atol=1e-9)
    last = Predictions(said.logits[-1:], said.boxes[-1:])
    targets = [
        {"class_labels": label[label >= 0], "boxes": box[label >= 0]}
        for label, box in zip(batch.labels, batch.boxes, strict=True)
    ]
    loss, their_loss = set_loss(last, batch).mean(), _transformers_loss(config, peer.logits, peer.pred_boxes, targets)
    torch.testing.assert_close(loss, their_loss, rtol=1e-9, atol=1e-9)
    config.auxiliary_loss = True
    deep = _transformers_loss(config, said.logits[-1], said.boxes[-1], targets, said)
    torch.testing.assert_close(set_loss(said, batch).mean(), deep, rtol=1e-9, atol=1e-9)
    loss.backward()
    their_loss.backward()
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9, msg=name)


@claim.measured(paper="42.0 AP on COCO with ResNet-50 (Table 1)")
def learns_to_find(lab):
    """Trained on scenes of up to two digits of four kinds, it finds held-out digits in held-out scenes with an AP50
    above 0.3, where answering with the objects of another scene gets next to nothing."""
    runs = [lab.train("detr", seed=seed) for seed in lab.seeds(3)]
    task, reached = lab.task("detr"), [run.evaluation.metrics.get("AP50", 0.0) for run in runs]
    found = runs[0].model.detect((batch := next(task.held_out_batches(8))).images)
    figures = {
        "Held-out scenes: what was found, and, dashed, what is there": lab.figure(draw(batch.images, found, batch))
    }
    return lab.at_least(reached, 0.3, "AP50", numbers={"chance": task.chance()["AP50"]}, figures=figures)


@claim.measured(paper="NMS after the last decoder layer does not improve AP (Figure 4)")
def needs_no_suppression(lab):
    """Non-maximum suppression after the last decoder layer gains less than one point of AP."""
    gains = []
    for seed in lab.seeds(3):
        run = lab.train("detr", seed=seed)
        device = next(run.model.parameters()).device
        suppressed = lambda images, run=run: suppress(run.model.detect(images))
        gains.append(run.task.precision(suppressed, device=device)["AP"] - run.evaluation.metrics.get("AP", 0.0))
    return lab.at_most(gains, 0.01, unit="AP")


def _random() -> tuple[Predictions, Batch]:
    """What two layers of 7 queries might say of three scenes of 4, 0 and 2 objects."""
    torch.manual_seed(0)
    said = Predictions(torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.rand(2, 3, 7, 4, dtype=torch.float64))
    labels = torch.tensor([[0, 3, 1, 1, -1], [-1] * 5, [2, 0, -1, -1, -1]])
    boxes = 0.1 + 0.5 * torch.rand(3, 5, 4, dtype=torch.float64)
    return said, Batch(torch.zeros(3, 1, 8, 8), boxes, labels, torch.full((3,), 2.0, dtype=torch.float64))


def _loss_and_gradient(said: Predictions, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    said = Predictions(*(t.detach().clone().requires_grad_() for t in said))
    loss = set_loss(said, batch)
    return loss.detach(), torch.autograd.grad(loss.sum(), said)


def _transformers_loss(
    config, logits: Tensor, boxes: Tensor, targets: list, layers: Predictions | None = None
) -> Tensor:
    """transformers' own loss with its own matcher; its class weights follow the default dtype."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    torch.set_default_dtype(torch.float64)
    try:
        return ForObjectDetectionLoss(logits, targets, "cpu", boxes, config, *(layers or ()))[0]
    finally:
        torch.set_default_dtype(torch.float32)
