"""Claims of detr: the paper's equations, parity with peers, and what it measures."""

from itertools import permutations

import torch
from torch import Tensor, nn

from deltax import claim, part
from deltax.papers.detection.detr import DETR, Predictions, detr, grid_sinusoids, match, set_loss
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention
from deltax.papers.vision.backbones.resnet import Backbone
from deltax.parts.attention.context import Context
from deltax.parts.detection.boxes import corners, giou, iou, suppress
from deltax.tasks.detection.scenes import Batch, draw
from deltax.weights.detection.detr import from_hf


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
    mixed = layer(blank, Context(pos_embed=places[None]))
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
