import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deltax import UserError, part
from deltax.expression import recipe
from deltax.parts.training.objectives import classify
from deltax.tasks.images import pictures
from deltax.tasks.images.digits import Digits
from deltax.tasks.images.few_labels import UNLABELLED, FewLabels, LinearProbe
from deltax.tasks.images.pictures import Drawings, Pictures, read_picture
from deltax.tasks.images.zip_codes import ZipCodes
from deltax.train.job import Job
from deltax.train.loop import train


def draw(path, seed, *, size=(13, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve cats and twelve dogs."""
    for i in range(24):
        draw(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.{'png' if i % 3 else 'jpg'}", i)
    return tmp_path


def everything(task):
    return torch.cat([task.all(split).labels for split in ("train", "validation", "sealed")])


def test_by_default_it_is_the_digits():
    ours, theirs = Pictures(), Digits()
    assert ours.task_spec == theirs.task_spec
    for a, b in zip(ours.batch(3, size=7, seed=1), theirs.batch(3, size=7, seed=1), strict=True):
        assert torch.equal(a, b)
    large = Pictures(size=16)
    assert large.task_spec["size"] == 16 and large.all().images.shape[1:] == (1, 16, 16)
    torch.testing.assert_close(large.all().images.mean(), ours.all().images.mean(), rtol=1e-3, atol=1e-3)


def test_a_folder_of_classes(folder):
    task = Pictures(source=str(folder), size=8)
    assert task.classes == ("cat", "dog") and task.task_spec == {"channels": 3, "size": 8, "classes": 2}
    labels = everything(task)
    assert len(labels) == 24 and labels.sum() == 12
    batch = task.batch(0, size=5, seed=0)
    assert batch.images.shape == (5, 3, 8, 8) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert len(task.all().labels) >= 1 and set(task.all("train").labels.tolist()) == {0, 1}
    assert task.fingerprint == Pictures(source=str(folder), size=8).fingerprint


def test_a_picture_keeps_its_split_when_others_come(folder):
    before = pictures.load(str(folder), size=8)
    for i in range(100, 130):
        draw(folder / "bird" / f"{i}.png", i)
    after = pictures.load(str(folder), size=8)
    of = lambda album: {album.names[row]: split for split, rows in album.rows.items() for row in rows}
    assert all(of(after)[name] == split for name, split in of(before).items())
    assert after.classes == ("bird", "cat", "dog")


def test_equal_pictures_share_a_split(folder):
    for i in range(6):
        draw(folder / "cat" / f"copy{i}.png", 77)
    album = pictures.load(str(folder), size=8)
    copies = [i for i, name in enumerate(album.names) if "copy" in name]
    assert sum(bool(np.isin(copies, rows).any()) for rows in album.rows.values()) == 1


def test_the_folder_may_say_what_is_held_out(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    for split, count in (("train", 4), ("test", 3)):
        for kind in ("cat", "dog"):
            for i in range(count):
                draw(root / split / kind / f"{i}.png", i + 10 * len(kind + split) + (kind == "cat") * 100)
    task = Pictures(source=str(root))
    assert {s: len(task.all(s).labels) for s in ("train", "validation", "sealed")} == {
        "train": 8,
        "validation": 6,
        "sealed": 0,
    }
    assert task.task_spec["size"] == 32


@pytest.mark.parametrize("mode, channels", [("L", 1), ("1", 1), ("P", 3), ("RGBA", 3), ("LA", 1), ("CMYK", 3)])
def test_every_mode_is_read(tmp_path, mode, channels):
    path = tmp_path / ("a.png" if mode != "CMYK" else "a.jpg")
    draw(path, 0, mode=mode)
    pixels = read_picture(path, "a")
    assert pixels.dtype == np.uint8 and pixels.shape == (9, 13, channels)


def test_sixteen_bits_are_not_cut_off(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)).save(tmp_path / "deep.png")
    pixels = read_picture(tmp_path / "deep.png", "deep.png")
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 20


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", "clear.png") == 255).all()


def test_grey_folders_have_one_channel(tmp_path):
    for i in range(24):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png", i, mode="L")
    assert Pictures(source=str(tmp_path)).task_spec["channels"] == 1
    assert Pictures(source=str(tmp_path), channels=3).task_spec["channels"] == 3


def corrupt(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def spoil(folder):
    """A truncated picture, a file that is none, and a class with nothing in it."""
    corrupt(folder / "cat" / "1.png")
    (folder / "dog" / "2.png").write_text("no picture")
    (folder / "empty").mkdir()


def test_faults_stop_and_are_named(folder):
    spoil(folder)
    with pytest.raises(UserError) as raised:
        Pictures(source=str(folder))
    text = str(raised.value)
    assert "cat/1.png is a corrupt picture" in text and "dog/2.png is no picture" in text
    assert "empty is an empty class" in text and "task.faults=skip" in text and "\n" not in text


def test_faults_may_be_skipped_with_a_warning(folder):
    spoil(folder)
    with pytest.warns(UserWarning, match=r"left out of .*corrupt"):
        task = Pictures(source=str(folder), faults="skip")
    assert len(task.skipped) == 3 and len(everything(task)) == 22 and task.classes == ("cat", "dog")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(folder):
    (folder / "cat" / "1.png").chmod(0)
    with pytest.raises(UserError, match=r"cat/1\.png cannot be read"):
        Pictures(source=str(folder))


def test_a_class_missing_from_training(tmp_path):
    for split, kinds in (("train", "ab"), ("val", "abc")):
        for kind in kinds:
            draw(tmp_path / split / kind / "0.png", ord(kind) + len(split))
    with pytest.raises(UserError, match=r"class c is missing from training: .* or remove val/c"):
        Pictures(source=str(tmp_path))
    with pytest.warns(UserWarning, match="class c is missing"):
        task = Pictures(source=str(tmp_path), faults="skip")
    assert task.classes == ("a", "b") and len(task.all().labels) == 2


def test_other_bad_folders(tmp_path, folder):
    (tmp_path / "void").mkdir()
    for bad, says in (
        ({"source": str(folder / "missing")}, "no folder"),
        ({"source": ""}, "no folder"),
        ({"source": str(tmp_path / "void")}, "0 classes"),
        ({"source": str(folder), "faults": "ignore"}, "'stop' or 'skip'"),
        ({"source": str(folder), "channels": 2}, "channels is 1 or 3"),
        ({"channels": 3}, "1 channel"),
        ({"size": 0}, "whole number"),
    ):
        with pytest.raises(UserError, match=says):
            Pictures(**bad)
    draw(folder / "loose.png", 3)
    with pytest.raises(UserError, match=r"loose\.png lies in no class folder"):
        Pictures(source=str(folder))


def test_a_changed_folder_is_read_again(folder):
    before = len(everything(Pictures(source=str(folder))))
    draw(folder / "cat" / "new.png", 99)
    assert len(everything(Pictures(source=str(folder)))) == before + 1


@pytest.mark.parametrize("of", ["resnet", "lenet-1989", "simclr", "u-net"])
def test_recipes_take_a_folder_in_place_of_the_digits(of, tmp_path):
    for i in range(60):
        draw(tmp_path / "ab"[i % 2] / f"{i}.png", i, mode="L")
    tree = recipe(of, [f"task.source={tmp_path}"])
    if of == "lenet-1989":
        tree = tree.put("task.images", 20)
    if of == "simclr":
        tree = tree.put("task.labels", 6)
    outcome = train(Job(tree.put("loop.batch", 2), steps=2))
    assert outcome.evaluation is not None and np.isfinite(outcome.evaluation.score)


def test_zip_codes_come_in_order_and_smaller_sets_are_the_beginning_of_larger_ones():
    small, large = ZipCodes(images=20), ZipCodes(images=50)
    assert torch.equal(large.batch(0, size=20, seed=0).images, small.all("train").images)
    assert torch.equal(small.batch(3, size=8, seed=1).labels, small.batch(3, size=8, seed=9).labels)
    assert torch.equal(small.batch(20, size=1, seed=0).images, small.batch(0, size=1, seed=0).images)
    assert torch.equal(small.all().images, large.all().images) and small.fingerprint != large.fingerprint
    taught = {tuple(image.flatten().tolist()) for image in ZipCodes(images=1000).all("train").images}
    asked = {tuple(image.flatten().tolist()) for image in small.all().images}
    assert len(asked) > 500 and not taught & asked
    for bad in (0, 1001, 2.5):
        with pytest.raises(UserError, match="images"):
            ZipCodes(images=bad)


def test_turned_digits_are_the_same_digits():
    plain, turned, whole = ZipCodes(), ZipCodes(turn=40.0), ZipCodes(turn=90.0)
    assert torch.equal(plain.all().labels, turned.all().labels)
    assert not torch.allclose(plain.all().images, turned.all().images)
    torch.testing.assert_close(whole.all().images, plain.all().images.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_few_labels():
    task, more = FewLabels(labels=20), FewLabels(labels=30)
    batch = task.batch(0, size=31, seed=2)
    assert (batch.labels[:16] >= 0).all() and (batch.labels[16:] == UNLABELLED).all()
    seen = lambda t: {i.numpy().tobytes() for s in range(40) for i in t.batch(s, size=64, seed=0).images[:32]}
    assert len(seen(task)) == 20 and seen(task) < seen(more)
    for bad in (9, 10_000, 1.5):
        with pytest.raises(UserError, match="labels"):
            FewLabels(labels=bad)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = task.evaluate(model, classify)
    assert found.score == pytest.approx(found.values.mean()) and set(found.values) <= {0.0, 100.0}


def test_a_probe_reads_what_is_there_to_read():
    task = LinearProbe(labels=100)

    class Reader(nn.Module):
        def __init__(self, blind):
            super().__init__()
            self.blind, self.weight = blind, nn.Parameter(torch.ones(()))

        def features(self, images):
            return images.flatten(1) * (0.0 if self.blind else 1.0)

        def forward(self, images):
            return images.flatten(1)[:, :3]

    nothing = lambda model, batch: torch.zeros(len(batch.labels))
    seeing, blind = (task.evaluate(Reader(b), nothing) for b in (False, True))
    assert seeing.score < 25 < 80 < blind.score
    assert seeing.metrics["error reading the output"] > seeing.score


def test_drawings_are_scored_by_the_objective():
    task = Drawings(size=16)
    assert task.evaluate(nn.Linear(1, 1), lambda model, batch: batch.images.mean((1, 2, 3))).metrics == {}


def test_the_reader_is_a_part():
    tree = part(Pictures, size=12)
    assert tree().task_spec["size"] == 12
