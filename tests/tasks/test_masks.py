"""Masks: exact for digits, true to COCO's polygons and RLE, judged by known answers, and every fault with its file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from deltax import UserError
from deltax.parts.detection.boxes import corners
from deltax.parts.detection.masks import Segments, instances, panoptic
from deltax.tasks.detection.coco import CocoScenes, Outline
from deltax.tasks.detection.masks import (
    MaskScenes,
    draw_masks,
    fitted,
    mask_precision,
    panoptic_quality,
    read_mask,
    visible,
    whose,
)


@pytest.fixture(scope="module")
def task() -> MaskScenes:
    return MaskScenes(size=24, classes=4, held_out=24)


def told(batch) -> Segments:
    return Segments((batch.labels >= 0).float(), batch.labels.clamp(min=0), batch.masks)


def test_scenes_are_those_without_masks_and_batches_pure(task):
    batch = task.batch(3, size=6, seed=1)
    plain = CocoScenes(size=24, classes=4, held_out=24).batch(3, size=6, seed=1)
    assert all(torch.equal(mine, other) for mine, other in zip(batch, plain, strict=False))
    assert torch.equal(batch.masks, task.batch(3, size=9, seed=1).masks[:6])
    assert [len(p.masks) for p in batch.pieces(3)] == [2, 2, 2] and batch.to("cpu").masks.dtype == torch.bool
    assert task.fingerprint != CocoScenes(size=24, classes=4, held_out=24).fingerprint
    assert task.fingerprint == MaskScenes(size=24, classes=4, held_out=24).fingerprint


def test_every_dark_pixel_is_of_one_object_and_inside_its_box(task):
    batch = task.batch(0, size=40, seed=0)
    assert torch.equal(batch.masks.any(1), batch.images[:, 0] > -0.5) and batch.masks.sum(1).max() == 1
    assert torch.equal(batch.masks.any((2, 3)), batch.labels >= 0)
    for masks, boxes, labels in zip(batch.masks, batch.boxes, batch.labels, strict=True):
        for mask, box in zip(masks[labels >= 0], corners(boxes[labels >= 0]) * 24, strict=True):
            rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
            assert columns.min() >= box[0] - 1e-4 and columns.max() < box[2] + 1e-4
            assert rows.min() >= box[1] - 1e-4 and rows.max() < box[3] + 1e-4


def test_of_two_inks_the_darker_shows_and_the_first_of_equals():
    ink = np.full((2, 2), 0.5, dtype=np.float32)
    dark = np.array([[1.0, 0.5], [0.0, -0.9]], dtype=np.float32)
    at = np.array([1, 1, 3, 3])
    [masks] = visible([[(ink, 0, at), (dark, 1, at)]], 4, 3)
    assert masks[1].sum() == 1 and masks[1, 1, 1] and masks[0].sum() == 3 and not masks[2].any()


def test_precision_and_quality_of_known_answers(task):
    batches = list(task.held_out_batches(10))
    assert mask_precision([told(b) for b in batches], batches) == {"AP": 1.0, "AP50": 1.0}
    assert panoptic_quality([whose(b) for b in batches], batches, 4) == 1.0
    nothing = [torch.full_like(whose(b), -1) for b in batches]
    assert panoptic_quality(nothing, batches, 4) == 0.0
    silent = [told(b)._replace(scores=torch.zeros(b.labels.shape)) for b in batches]
    assert mask_precision(silent, batches) == {"AP": 0.0, "AP50": 0.0}
    assert task.chance()["AP50"] < 0.1


def test_quality_counts_what_is_missed_and_what_is_made_up():
    task = MaskScenes(size=16, classes=1, most=1)
    batch = task.batch(0, size=1, seed=0)
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    masks[0, 0, 0:4, 0:4], masks[0, 1, 8:12, 8:12] = True, True
    real = batch._replace(labels=torch.tensor([[0, 0]]), masks=masks)
    said = whose(real)
    said[0, 8:12, 8:12] = -1  # missed
    said[0, 0, 0:4] = -1  # three quarters of the other: IoU 12 / 16
    said[0, 12:15, 0:3] = torch.tensor([0, 7])  # made up
    assert panoptic_quality([said], [real], 1) == pytest.approx(0.75 / (1 + 0.5 + 0.5))


def test_readings_of_the_same_masks_agree(task):
    batch = task.batch(0, size=8, seed=0)
    label = torch.where(batch.labels >= 0, batch.labels, 4)
    logits, masks = 60.0 * torch.nn.functional.one_hot(label, 5), 60.0 * (2.0 * batch.masks.float() - 1)
    assert torch.equal(panoptic(logits, masks), whose(batch))
    found = instances(logits, masks)
    assert torch.equal(found.masks, batch.masks) and torch.equal(found.scores > 0.5, batch.labels >= 0)
    assert mask_precision([found], [batch])["AP"] == 1.0
    unsure = panoptic(logits / 60, masks)
    assert (unsure == -1).all()  # no class above 0.8
    covered = masks.clone()
    covered[:, 1] = covered[:, 0]
    both = logits.clone()
    both[:, 0], both[:, 1] = torch.tensor([60.0, 0, 0, 0, 0]), torch.tensor([0.0, 50, 0, 0, 0])
    assert not (panoptic(both, covered)[..., 1] == 1).any()  # nothing of it is left to see


def test_drawn_masks_and_outlines(task):
    batch = task.batch(0, size=8, seed=0)
    figure = draw_masks(batch.images, told(batch), batch)
    overlays = sum(len(axes.images) - 1 for axes in figure.axes)
    assert overlays == (batch.labels >= 0).sum() and len(figure.axes) == 8
    assert draw_masks(torch.zeros(1, 3, 24, 24), told(batch.pieces(8)[0])).axes


def outline(segmentation, high=6, wide=8) -> Outline:
    return Outline(segmentation, "a.png: annotation 1 of pets.json", high, wide)


def test_polygons_and_both_kinds_of_rle_are_the_same_mask():
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[1:4, 2:7] = 1
    packed = coco.encode(np.asfortranarray(mask))
    runs = [2 * 6 + 1] + [3, 3] * 4 + [3, 6 + 2]
    kinds = [
        [[2, 1, 7, 1, 7, 4, 2, 4]], {"size": [6, 8], "counts": packed["counts"].decode()},
        {"size": [6, 8], "counts": packed["counts"]}, {"size": [6, 8], "counts": runs},
    ]  # fmt: skip
    for kind in kinds:
        read, fault = read_mask(outline(kind))
        assert not fault and np.array_equal(read, mask), kind
    draw = np.random.default_rng(0)
    for _ in range(20):
        noise = (draw.random((37, 41)) > draw.random()).astype(np.uint8)
        rle = coco.encode(np.asfortranarray(noise)) | {"size": [37, 41]}
        read, fault = read_mask(outline({"size": [37, 41], "counts": rle["counts"].decode()}, 37, 41))
        assert np.array_equal(read, noise) if noise.any() else fault


BROKEN = {
    "none": (None, "no segmentation of polygons or RLE"),
    "an empty list": ([], "no segmentation of polygons or RLE"),
    "outside": ([[20, 1, 30, 1, 30, 4]], "mask outside the picture of 8 x 6"),
    "two points": ([[1, 1, 4, 4]], "fewer than three points"),
    "odd": ([[1, 1, 4, 4, 3]], "x, y, x, y"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "x, y, x, y"),
    "not finite": ([[1, 1, float("nan"), 1, 4, 4]], "fewer than three points"),
    "no area": ([[2, 2, 2, 2, 2, 2]], "without area"),
    "another size": ({"size": [9, 9], "counts": [81]}, "RLE of size"),
    "a short RLE": ({"size": [6, 8], "counts": [3, 4]}, "corrupt RLE: its runs cover 7 of 48"),
    "a negative run": ({"size": [6, 8], "counts": [50, -2]}, "corrupt RLE"),
    "no runs": ({"size": [6, 8]}, "counts cannot be read"),
    "bad characters": ({"size": [6, 8], "counts": "\x01\x02"}, "counts cannot be read"),
    "cut off": ({"size": [6, 8], "counts": "oooo"}, "corrupt RLE"),
    "an empty RLE": ({"size": [6, 8], "counts": [48]}, "without area"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_mask_is_no_mask_but_a_sentence(kind):
    segmentation, sentence = BROKEN[kind]
    mask, fault = read_mask(outline(segmentation))
    assert mask is None and sentence in fault


def test_a_mask_partly_outside_is_clipped_and_named():
    mask, fault = read_mask(outline([[5, 1, 12, 1, 12, 4, 5, 4]]))
    assert "partly outside" in fault and mask.sum() == 9 and mask[1:4, 5:].all()


def test_fitted_masks_stay_with_their_pictures():
    mask = np.zeros((30, 60), dtype=bool)
    mask[10:20, 20:40] = True
    small = fitted(mask, 30)
    assert small[5:10, 10:20].all() and not small[15:].any() and 45 <= small.sum() <= 55
    thin = np.zeros((64, 64), dtype=bool)
    thin[:, 30] = True
    assert fitted(thin, 8).any()


def write(folder, **of_third):
    (folder / "images").mkdir(parents=True)
    lists = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for i in range(12):
        pixels = np.zeros((30, 40), dtype=np.uint8)
        pixels[4:20, 6:30] = 255
        pixels[25:] = 10 * i
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        lists["images"].append({"id": i, "file_name": f"{i}.png", "width": 40, "height": 30})
        given = {"id": i, "image_id": i, "category_id": 1, "bbox": [6, 4, 24, 16]}
        given |= {"segmentation": [[6, 4, 30, 4, 30, 20, 6, 20]]}
        lists["annotations"].append(given | (of_third if i == 3 else {}))
    (folder / "pets.json").write_text(json.dumps(lists))
    return str(folder)


def test_masks_of_a_folder_lie_over_the_bright_block(tmp_path):
    task = MaskScenes(source=write(tmp_path), size=40)
    batch = task.batch(0, size=8, seed=0)
    assert batch.masks.shape == (8, 1, 40, 40)
    assert torch.equal(batch.masks[:, 0], batch.images[:, 0] > 0.9)
    batches = list(task.held_out_batches(8))
    assert mask_precision([told(b) for b in batches], batches)["AP"] == pytest.approx(1.0)
    assert task.fingerprint != CocoScenes(source=str(tmp_path), size=40).fingerprint


@pytest.mark.parametrize(
    ("segmentation", "sentence"),
    [
        (None, "no segmentation"),
        ([[100, 1, 130, 1, 130, 4]], "mask outside"),
        ({"size": [30, 40], "counts": "oooo"}, "corrupt RLE"),
    ],
    ids=["none", "outside", "corrupt"],
)
def test_a_fault_names_its_file_and_training_stops_or_goes_on(tmp_path, segmentation, sentence):
    source = write(tmp_path, segmentation=segmentation)
    with pytest.raises(UserError, match=rf"3\.png: annotation 3 of pets\.json .*{sentence}"):
        MaskScenes(source=source)
    with pytest.warns(UserWarning, match=sentence):
        task = MaskScenes(source=source, faults="skip")
    batches = [task.batch(0, size=40, seed=0)]
    assert all(torch.equal(b.masks.any((2, 3)), b.labels >= 0) for b in batches)
    assert any(
        (b.labels < 0).all(1).any() for b in [*batches, *task.held_out_batches(9), *task.held_out_batches(9, "sealed")]
    )
    CocoScenes(source=source)  # boxes do not ask for masks


def test_scenes_without_any_object_are_judged(tmp_path):
    task = MaskScenes(size=24, classes=4, held_out=24)
    batch = task.batch(0, size=4, seed=0)
    empty = batch._replace(labels=torch.full_like(batch.labels, -1), masks=torch.zeros_like(batch.masks))
    assert mask_precision([told(batch)], [empty]) == {"AP": 0.0, "AP50": 0.0}
    assert panoptic_quality([torch.full_like(whose(empty), -1)], [empty], 4) == 0.0
