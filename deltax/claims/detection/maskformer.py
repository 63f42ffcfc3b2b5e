"""Claims of maskformer: the paper's equations, parity with peers, and what it measures."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from deltax import Part, claim, part
from deltax.claims.agreement import randomised
from deltax.papers.detection.maskformer import MaskPredictions, mask_set_loss, maskformer
from deltax.papers.vision.backbones.resnet import Backbone
from deltax.parts.detection.masks import (
    PixelClassifier,
    classify_pixels,
    panoptic,
    semantic,
)
from deltax.parts.model.convolution import GroupNorm
from deltax.tasks.detection.masks import MaskBatch, draw_masks, panoptic_quality, whose
from deltax.weights.detection.maskformer import from_hf


@claim
def sure_masks_are_the_label_map():
    """With sure classes and disjoint masks, semantic inference gives the label map, and panoptic inference the things,
    exactly, also where two things of one class touch; what is no object's is nothing's."""
    torch.manual_seed(0)
    batch = _truth()
    sure = lambda x: 80.0 * (2 * x.double() - 1)
    label = torch.where(batch.labels >= 0, batch.labels, 4)
    order = torch.randperm(5)
    logits = sure(nn.functional.one_hot(label, 5))[:, order]
    masks = sure(batch.masks)[:, order]
    truth = whose(batch)
    there = batch.masks.any(1)
    assert torch.equal(semantic(logits, masks).argmax(1)[there], truth[..., 0][there])
    found = panoptic(logits, masks)
    assert torch.equal(found[..., 0], truth[..., 0])
    assert torch.equal(torch.where(there, order[found[..., 1]], -1), truth[..., 1])
    assert panoptic_quality([found], [batch], 4) == 1.0


@claim
def each_pixel_goes_to_one_of_the_kept():
    """Panoptic inference is, pixel by pixel and query by query, the rule of both released codes: with `least` = 0 that
    of MaskFormer, with 0.5 that of Mask2Former, and queries of one class of stuff are one segment."""
    torch.manual_seed(0)
    logits = 2.5 * torch.randn(6, 9, 4, dtype=torch.float64)
    masks = torch.randn(6, 9, 11, 13, dtype=torch.float64) + 2 * torch.randn(6, 9, 1, 1, dtype=torch.float64)
    dropped = 0
    for least, stuff in ((0.0, ()), (0.5, ()), (0.5, (0, 2)), (0.0, (1,))):
        ours = panoptic(logits, masks, sure=0.5, seen=0.8, least=least, stuff=stuff)
        slow = torch.stack([_one_by_one(*scene, least, stuff) for scene in zip(logits, masks, strict=True)])
        assert torch.equal(ours, slow)
        dropped += int((ours < 0).sum())
    assert dropped and (ours >= 0).any()


@claim.parity(peer="transformers post_process_panoptic_segmentation")
def panoptic_inference_is_that_of_transformers():
    """With sure classes, where transformers' masks times probabilities are the masks, panoptic inference with `least` =
    0 gives its segments and classes, with stuff fused and not."""
    from types import SimpleNamespace

    from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

    torch.manual_seed(0)
    logits = 400 * nn.functional.one_hot(torch.randint(0, 5, (8, 7)), 5).double()
    masks = torch.randn(8, 7, 9, 12, dtype=torch.float64) + 2 * torch.randn(8, 7, 1, 1, dtype=torch.float64)
    said = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
    for stuff in ((), (1, 3)):
        peer = MaskFormerImageProcessorPil().post_process_panoptic_segmentation(
            said, threshold=0.8, label_ids_to_fuse=set(stuff)
        )
        for ours, theirs in zip(panoptic(logits, masks, least=0.0, stuff=stuff), peer, strict=True):
            classes = {s["id"]: s["label_id"] for s in theirs["segments_info"]}
            segment = theirs["segmentation"].long()
            label = torch.tensor([[classes.get(i, -1) for i in row] for row in segment.tolist()])
            assert torch.equal(ours[..., 0], label)
            same = lambda numbers: numbers.flatten()[:, None] == numbers.flatten()
            assert torch.equal(same(ours[..., 1]), same(segment.clamp(min=0)))


@claim
def a_set_of_masks_has_no_order():
    """Permuting the queries, or the objects of a scene, changes neither the loss nor its gradients."""
    said, batch = random_scene()
    loss, gradient = _loss_and_gradient(said, batch)
    queries, objects = torch.randperm(7), torch.randperm(5)
    shuffled = MaskPredictions(said.logits[:, :, queries], said.masks[:, :, queries])
    renamed = batch._replace(labels=batch.labels[:, objects], masks=batch.masks[:, objects])
    for other, truth, order in ((shuffled, batch, queries), (said, renamed, slice(None))):
        same, its_gradient = _loss_and_gradient(other, truth)
        torch.testing.assert_close(same, loss)
        for mine, theirs in zip(gradient, its_gradient, strict=True):
            torch.testing.assert_close(mine[:, :, order], theirs)


@claim
def an_empty_scene_teaches_silence():
    """Scenes without objects give a finite loss, gradients of the logits that raise "no object" alone, and none of
    the masks; read in pieces, a batch has the loss that it has as a whole."""
    said, batch = random_scene()
    empty = batch._replace(labels=torch.full_like(batch.labels, -1), objects=torch.zeros_like(batch.objects))
    loss, (of_logits, of_masks) = _loss_and_gradient(said, empty)
    assert loss.isfinite().all() and of_masks.abs().max() == 0
    assert (of_logits[..., -1] < 0).all() and (of_logits[..., :-1] > 0).all()
    whole, gradient = _loss_and_gradient(said, batch)
    for i, piece in enumerate(batch.pieces(3)):
        loss, its = _loss_and_gradient(MaskPredictions(*(t[:, i : i + 1] for t in said)), piece)
        torch.testing.assert_close(loss, whole[i : i + 1])
        for part_of_it, all_of_it in zip(its, gradient, strict=True):
            torch.testing.assert_close(part_of_it, all_of_it[:, i : i + 1])


@claim.parity(peer="transformers MaskFormerForInstanceSegmentation")
def equals_transformers():
    """The same random weights give transformers' class logits, masks and gradients, and the same outputs its loss over
    all layers, to 1e-9 in float64."""
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig

    torch.manual_seed(0)
    shape = dict(embedding_size=6, hidden_sizes=[8, 12, 10], depths=[1, 1, 2], num_channels=2)
    resnet = ResNetConfig(**shape, out_features=["stage1", "stage2", "stage3"], layer_type="basic")
    inside = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet)
    coder = DetrConfig(
        **inside, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=128, num_queries=7,
        dropout=0.0,
    )  # fmt: skip
    config = MaskFormerConfig(
        backbone_config=resnet, decoder_config=coder, fpn_feature_size=32, mask_feature_size=32, num_labels=4
    )
    theirs = randomised(MaskFormerForInstanceSegmentation(config).double().eval())
    tree = maskformer.put("model.backbone", part(Backbone, stem_width=6, widths=(8, 12, 10), depths=(1, 1, 2)))
    tree = tree.put("model.queries", 7).put("model.decoder.inner.depth", 3).set(GroupNorm, groups=32)
    ours = loaded(tree, from_hf(theirs.state_dict()))

    images = torch.randn(3, 2, 53, 47, dtype=torch.float64)
    said, peer = ours(images), theirs(images)
    torch.testing.assert_close(said.logits[-1], peer.class_queries_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said.masks[-1], peer.masks_queries_logits, rtol=1e-9, atol=1e-9)
    (said.logits[-1].sum() + said.masks[-1].pow(2).sum()).backward()
    (peer.class_queries_logits.sum() + peer.masks_queries_logits.pow(2).sum()).backward()
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9, msg=name)

    said, batch = random_scene()
    assert_loss_of_transformers(theirs, said, batch, mask_set_loss)


def loaded(tree: Part, state: dict[str, Tensor]) -> nn.Module:
    """The model of a recipe, for two channels and four classes, with this state."""
    ours = tree().build({"channels": 2, "classes": 4}).double().eval()
    counts = {k: v for k, v in ours.state_dict().items() if k.endswith("num_batches_tracked")}
    ours.load_state_dict(state | counts)
    return ours


def assert_loss_of_transformers(
    peer: nn.Module, said: MaskPredictions, batch: MaskBatch, loss: Callable[[MaskPredictions, MaskBatch], Tensor]
) -> None:
    """Our loss of what was said, over all layers, and its gradients, are the peer's."""
    said = MaskPredictions(*(t.detach().clone().requires_grad_() for t in said))
    truth = [(m[c >= 0].double(), c[c >= 0]) for m, c in zip(batch.masks, batch.labels, strict=True)]
    layers = [{"masks_queries_logits": m, "class_queries_logits": c} for c, m in zip(*said, strict=True)]
    *early, last = layers
    masks, labels = (list(column) for column in zip(*truth, strict=True))
    found = peer.get_loss_dict(last["masks_queries_logits"], last["class_queries_logits"], masks, labels, early)
    their_loss, our_loss = peer.get_loss(found), loss(said, batch).mean()
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-9, atol=1e-9)
    for mine, other in zip(torch.autograd.grad(our_loss, said), torch.autograd.grad(their_loss, said), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@claim.measured(paper="mask classification beats per-pixel classification where classes are many (Table 1)")
def things_of_one_kind_stay_two(lab):
    """Each at the better of its rate and three times that, on scenes of up to three digits that may touch, with one
    backbone and one pixel decoder, mask classification has a higher panoptic quality than classification of pixels,
    whose things are what hangs together.

    A first version trained both at the recipe's rate, untuned, and was opposite.
    """
    by_pixel = maskformer.fill("model", PixelClassifier).fill("objective", classify_pixels)
    ours, others = (_tuned_runs(lab, recipe) for recipe in (maskformer, by_pixel))
    quality = lambda runs: [run.evaluation.metrics["PQ"] for run in runs]
    gains = [a - b for a, b in zip(quality(ours), quality(others), strict=True)]
    batch = next(ours[0].task.held_out_batches(8))
    found = lab.figure(draw_masks(batch.images, ours[0].model.segment(batch.images), batch))
    return lab.at_least(
        gains, 0.0, "PQ", numbers={"mask classification": quality(ours)[0], "pixel classification": quality(others)[0]},
        figures={"Held-out scenes: the masks that were found, and, dashed, those that are there": found},
    )  # fmt: skip


@claim.measured(paper="52.7 PQ on COCO panoptic (abstract)")
def learns_to_cut_out(lab):
    """Trained on scenes of up to three digits of four kinds, it reaches a panoptic quality above 0.6 on held-out
    scenes."""
    runs = _tuned_runs(lab, maskformer)
    numbers = {"mask AP": runs[0].evaluation.metrics["AP"], "chance of AP": runs[0].task.chance()["AP"]}
    return lab.at_least([run.evaluation.metrics["PQ"] for run in runs], 0.6, "PQ", numbers=numbers)


RATES = (1.0, 3.0)  # multiples of a recipe's rate that are tried on the seed for tuning


def _tuned_runs(lab, recipe: Part) -> list:
    lr_scale = lab.tuned(recipe, RATES)
    return [lab.train(recipe, seed=seed, lr_scale=lr_scale) for seed in lab.seeds(3)]


def _truth() -> MaskBatch:
    """Three scenes of 4, 0 and 2 objects in bands of 12 x 10 pixels; of the first, two of class 1 touch."""
    labels = torch.tensor([[0, 3, 1, 1, -1], [-1] * 5, [2, 0, -1, -1, -1]])
    masks = torch.zeros(3, 5, 12, 10, dtype=torch.bool)
    for k in range(5):
        masks[0, k, 2 * k : 2 * k + 2, 1:9] = k < 4
        masks[2, k, 5 * k : 5 * k + 4, k:7] = k < 2
    boxes = torch.zeros(3, 5, 4, dtype=torch.float64)
    return MaskBatch(torch.zeros(3, 1, 12, 10), boxes, labels, torch.full((3,), 2.0, dtype=torch.float64), masks)


def random_scene() -> tuple[MaskPredictions, MaskBatch]:
    """What two layers of 7 queries might say of `_truth`, at half its size."""
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.randn(2, 3, 7, 6, 5, dtype=torch.float64)
    return MaskPredictions(logits, masks), _truth()


def _loss_and_gradient(said: MaskPredictions, batch: MaskBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    said = MaskPredictions(*(t.detach().clone().requires_grad_() for t in said))
    loss = mask_set_loss(said, batch)
    return loss.detach(), torch.autograd.grad(loss.sum(), said)


def _one_by_one(logits: Tensor, masks: Tensor, least: float, stuff: tuple[int, ...]) -> Int[Tensor, "Y X 2"]:
    """Panoptic inference on one scene, as it is written in section 3.4 and the released codes."""
    odds, chance = logits.softmax(-1), masks.sigmoid()
    kept = [i for i in range(len(odds)) if odds[i].argmax() < odds.shape[1] - 1 and odds[i].max() > 0.5]
    found, first = torch.full((*masks.shape[1:], 2), -1), dict[int, int]()
    for i in kept:
        label = int(odds[i].argmax())
        won = torch.stack([odds[i].max() * chance[i] >= odds[k].max() * chance[k] for k in kept]).all(0)
        whole = (chance[i] >= 0.5).sum()
        mine = won & (chance[i] >= least)
        if not whole or not mine.any() or won.sum() / whole < 0.8:
            continue
        segment = first.setdefault(label, i) if label in stuff else i
        found[mine] = torch.tensor([label, segment])
    return found
