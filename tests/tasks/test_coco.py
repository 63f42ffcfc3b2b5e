"""COCO files: boxes that stay true to their pictures, what is held out, and every fault named with its file."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from deltax import UserError
from deltax.errors import DataWarning
from deltax.expression import recipe
from deltax.parts.detection.boxes import corners
from deltax.tasks.detection.coco import CocoScenes, load
from deltax.tasks.detection.scenes import Scenes
from deltax.train.job import Job
from deltax.train.loop import train


def write(folder, count=12, *, name="pets.json", start=0, classes=("cat", "dog"), grey=False, images="images"):
    """Pictures of one bright block each; the file that says where it is."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(start)
    told = {"images": [], "annotations": [], "categories": []}
    told["categories"] = [{"id": 10 * i + 10, "name": word} for i, word in enumerate(classes)]
    for i in range(start, start + count):
        wide, high = (40, 30) if i % 2 else (24, 48)
        pixels = np.zeros((high, wide, 3), dtype=np.uint8) + 60
        x, y, w, h = draw.integers(0, 8), draw.integers(0, 8), draw.integers(6, 14), draw.integers(6, 14)
        pixels[y : y + h, x : x + w] = 255
        picture = Image.fromarray(pixels)
        (picture.convert("L") if grey else picture).save(folder / images / f"{i}.png")
        told["images"].append({"id": i, "file_name": f"{i}.png", "width": wide, "height": high})
        box = [int(v) for v in (x, y, w, h)]
        told["annotations"].append({"id": i, "image_id": i, "category_id": 10 + 10 * (i % len(classes)), "bbox": box})
    (folder / name).write_text(json.dumps(told))
    return told


def rewrite(folder, told, name="pets.json"):
    (folder / name).write_text(json.dumps(told))


def test_boxes_frame_the_bright_block_in_every_shape_of_picture(tmp_path):
    write(tmp_path)
    task = CocoScenes(source=str(tmp_path), size=48)
    assert task.task_spec == {"channels": 3, "size": 48, "classes": 2} and task.class_names == ("cat", "dog")
    batch = task.batch(0, size=20, seed=0)
    assert batch.images.shape == (20, 3, 48, 48) and batch.images.abs().max() <= 1
    for image, box in zip(batch.images[:, 0], corners(batch.boxes)[:, 0] * 48, strict=True):
        x0, y0, x1, y1 = box.tolist()
        inside = image[round(y0) + 2 : round(y1) - 2, round(x0) + 2 : round(x1) - 2]
        assert inside.min() > 0.9
        bright = (image > 0.7).nonzero().float()
        torch.testing.assert_close(bright.mean(0), torch.tensor([y0 + y1, x0 + x1]) / 2 - 0.5, rtol=0, atol=1.0)
    grey = tmp_path / "grey"
    write(grey, grey=True)
    assert CocoScenes(source=str(grey / "pets.json"), size=32).task_spec["channels"] == 1
    assert CocoScenes(source=str(grey), size=32, channels=3).batch(0, size=2, seed=0).images.shape[1] == 3


def test_nothing_given_is_the_scenes_of_digits():
    for mine, theirs in zip(CocoScenes().batch(3, size=4, seed=1), Scenes().batch(3, size=4, seed=1), strict=True):
        assert torch.equal(mine, theirs)
    assert CocoScenes(held_out=8).fingerprint == Scenes(held_out=8).fingerprint


def test_splits_are_apart_and_batches_pure(tmp_path):
    write(tmp_path, 30)
    task = CocoScenes(source=str(tmp_path), size=32)
    rows = task._photos.rows
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(30)) and min(map(len, rows.values())) > 0
    for a, b in zip(task.batch(5, size=3, seed=2), task.batch(5, size=9, seed=2), strict=True):
        assert a.shape[1:] != (4,) or torch.equal(a, b[:3])
    one, other = (torch.cat([b.images for b in task.held_out_batches(size)]) for size in (1, 50))
    assert torch.equal(one, other) and len(one) == len(task.held_out_documents()) == len(rows["validation"])
    assert CocoScenes(source=str(tmp_path), size=32).fingerprint == task.fingerprint
    assert CocoScenes(source=str(tmp_path), size=33).fingerprint != task.fingerprint


def test_a_folder_as_coco_lays_it_out(tmp_path):
    (tmp_path / "annotations").mkdir()
    write(tmp_path, 6, name="annotations/instances_train2017.json", images="train2017")
    write(tmp_path, 4, start=50, name="annotations/instances_val2017.json", images="val2017")
    photos = load(str(tmp_path))
    assert {photos.names[i] for i in photos.rows["train"]} == {f"{i}.png" for i in range(6)}
    assert len(photos.rows["validation"]) == len(photos.rows["sealed"]) == 2


FAULTS = {
    "corrupt": (lambda f, t: (f / "images/3.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx"), "3.png is"),
    "missing": (lambda f, t: (f / "images/3.png").unlink(), "no picture 3.png"),
    "outside": (lambda f, t: t["annotations"][3].update(bbox=[100, 2, 5, 5]), "3.png: annotation 3 .* outside"),
    "partly outside": (lambda f, t: t["annotations"][3].update(bbox=[35, 2, 9, 5]), "3.png: .* partly outside"),
    "no area": (lambda f, t: t["annotations"][3].update(bbox=[5, 2, 0, 5]), "3.png: .* without area"),
    "no box": (lambda f, t: t["annotations"][3].update(bbox="all"), "3.png: .* four numbers"),
    "no such image": (lambda f, t: t["annotations"][3].update(image_id=77), "annotation 3 is of image 77"),
    "no such category": (lambda f, t: t["annotations"][3].update(category_id=7), "annotation 3 of 3.png .* category 7"),
    "two of one id": (lambda f, t: t["images"].append(dict(t["images"][3])), "2 images have the id 3"),
    "another size": (lambda f, t: t["images"][3].update(width=99), "3.png is 40 x 30 pixels, .* says 99 x 30"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_training_stops_or_goes_on(tmp_path, fault):
    told = write(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(tmp_path, told)
    rewrite(tmp_path, told)
    with pytest.raises(UserError, match=message):
        CocoScenes(source=str(tmp_path))
    with pytest.warns(UserWarning, match=message), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no object")
        task = CocoScenes(source=str(tmp_path), faults="skip")
    boxes = corners(task.batch(0, size=40, seed=0).boxes)
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6


def test_empty_scenes_are_kept_left_out_or_refused(tmp_path):
    told = write(tmp_path)
    told["annotations"].pop(4)
    rewrite(tmp_path, told)
    with pytest.warns(UserWarning, match=r"4.png has no object"):
        kept = load(str(tmp_path))
    assert len(kept.names) == 12 and len(kept.boxes[4]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "4.png" not in load(str(tmp_path), empty="skip").names
    with pytest.raises(UserError, match=r"4.png has no object"):
        load(str(tmp_path), empty="stop")


def test_a_class_that_is_not_trained_on(tmp_path):
    write(tmp_path, 6, name="train.json", classes=("cat",))
    write(tmp_path, 6, start=50, name="val.json", classes=("cat", "emu"))
    with pytest.raises(UserError, match=r"51.png is held out and shows a emu"):
        load(str(tmp_path))
    with pytest.warns(UserWarning, match="emu"):
        photos = load(str(tmp_path), faults="skip")
    assert photos.classes == ("cat",) and sum(map(len, photos.labels)) == 9


def test_crowds_are_left_out(tmp_path):
    told = write(tmp_path)
    told["annotations"][2]["iscrowd"] = 1
    rewrite(tmp_path, told)
    with pytest.warns(UserWarning, match=r"2.png has no object"):
        assert len(load(str(tmp_path)).boxes[2]) == 0


def test_what_cannot_be_read_at_all(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no COCO JSON"):
        load(str(tmp_path))
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"a.json is no JSON"):
        load(str(tmp_path))
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="no list of annotations"):
        load(str(tmp_path))
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="no picture of"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'skip'"):
        load(str(tmp_path), faults="skp")


def test_a_detector_learns_from_pictures_and_is_judged(tmp_path):
    write(tmp_path, 16)
    for expression in ("r-cnn+fast-r-cnn", "retinanet", "detr"):
        tree = recipe(expression, ["task.size=32", "loop.batch=2"]).put("task.source", str(tmp_path))
        outcome = train(Job(tree, 0, 2, 1.0))
        assert set(outcome.evaluation.metrics) == {"AP", "AP50"} and np.isfinite(outcome.evaluation.score)


def test_ids_that_two_share_are_named_and_mean_neither(tmp_path):
    told = write(tmp_path)
    told["images"] += [{**told["images"][4], "id": 1}, "no image"]
    told["categories"].append({"id": 20, "name": "emu"})
    rewrite(tmp_path, told)
    with pytest.raises(UserError) as stopped:
        load(str(tmp_path))
    for words in ("images have the id 1, 1.png and 4.png", "categories have the id 20, dog and emu", "images[13]"):
        assert words in str(stopped.value)
    with pytest.warns(DataWarning, match="left out"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no object")
        photos = load(str(tmp_path), faults="skip")
    assert "1.png" not in photos.names and len(photos.names) == 11
    assert photos.classes == ("cat",) and sum(len(labels) for labels in photos.labels) == 6


def test_a_category_that_no_picture_shows_is_told_and_training_goes_on(tmp_path):
    told = write(tmp_path)
    told["categories"].append({"id": 99, "name": "emu"})
    told["annotations"].append(["none"])
    rewrite(tmp_path, told)
    with pytest.raises(UserError, match=r"annotations\[12\] is no object"):
        load(str(tmp_path))
    told["annotations"].pop()
    rewrite(tmp_path, told)
    with pytest.warns(DataWarning, match=f"no picture of {tmp_path.name} shows emu"):
        assert load(str(tmp_path)).classes == ("cat", "dog")
