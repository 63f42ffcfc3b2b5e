"""What a run makes of held-out pictures: every kind is drawn, named, upright, and inside the page."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deltax import recipe
from deltax.cli import main
from deltax.lab import report
from deltax.lab.pictures import pictures, shortened
from deltax.lab.store import Store
from deltax.parts.detection.boxes import Detections
from deltax.parts.detection.masks import Segments
from deltax.tasks.detection.masks import draw_masks
from deltax.tasks.detection.scenes import HIDDEN, draw, framed
from deltax.train.job import task_of
from deltax.train.loop import build

HOSTILE = '<script>alert("x")</script> $a_b$ & co'

KINDS = {
    "vit": ("class", "looks"),
    "vit+register-tokens": ("class", "looks"),
    "resnet(n=1)": ("class",),
    "vit+swin": ("class",),
    "clip": ("caption", "looks"),
    "clip+siglip": ("caption", "looks"),
    "vit+mae": ("Seen",),
    "u-net": ("Spoilt",),
    "vq-vae": ("comes back",),
    "vq-vae+fsq": ("comes back",),
    "vit+vitok": ("videos",),
    "cosmos-tokenizer": ("videos",),
    "r-cnn": ("Boxes",),
    "r-cnn+fast-r-cnn": ("Boxes",),
    "r-cnn+fast-r-cnn+faster-r-cnn": ("Boxes",),
    "r-cnn+fast-r-cnn+faster-r-cnn+fpn": ("Boxes",),
    "retinanet": ("Boxes",),
    "detr": ("Boxes",),
    "maskformer": ("Masks",),
    "mask2former": ("Masks",),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_of_pictures_has_them_drawn(name):
    tree = recipe(name)
    task = task_of(tree)
    torch.manual_seed(0)
    drawn = pictures(tree, task, build(tree(), task, 0))
    assert len(drawn) == len(KINDS[name])
    for word, (caption, svg) in zip(KINDS[name], drawn.items(), strict=True):
        assert word in caption
        assert svg.startswith("<svg") and 'xlink:href="data:image/png;base64,' in svg


def test_text_has_no_pictures():
    assert pictures(recipe("gpt"), SimpleNamespace(task_spec={"vocab": 7}), torch.nn.Identity()) == {}


def test_the_same_weights_give_the_same_drawing_and_disturb_no_draw():
    tree = recipe("vit+mae")
    model = build(tree(), task_of(tree), 0)
    torch.manual_seed(5)
    once, after = pictures(tree, task_of(tree), model), torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    assert pictures(tree, task_of(tree), model) == once


def test_pictures_stand_upright_and_have_their_colours():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    image = torch.full((3, 2, 3), -1.0)
    image[0, 0, 2] = 1  # red in the upper right
    framed(axes, image)
    [shown] = axes.images
    assert shown.origin == "upper" and shown.get_array()[0, 2].tolist() == [1, 0, 0]
    for light, expected in (("paper", 0.0), ("photo", 1.0)):
        axes = Figure().subplots()
        framed(axes, torch.tensor([[[1.0, float("nan")]]]), light=light)
        row = axes.images[0].get_array()[0]
        assert row[0].tolist() == [expected] * 3
        np.testing.assert_allclose(row[1], HIDDEN, rtol=1e-6)


def test_things_are_named_where_they_are():
    """At each edge the name stays inside its picture, over what it names; what is less sure stays out."""
    boxes = torch.tensor([[[0.2, 0.1, 0.4, 0.2], [0.7, 0.8, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1]]])
    found = Detections(torch.tensor([[0.9, 0.6, 0.4]]), torch.tensor([[1, 0, 0]]), boxes)
    figure = draw(torch.zeros(1, 1, 20, 20), found, names=("cat", HOSTILE))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["cat 0.60", f"{HOSTILE} 0.90"]
    assert [text.get_va() for text in axes.texts] == ["bottom", "top"]
    corner = axes.patches[0]
    assert (corner.get_x(), corner.get_y()) == pytest.approx((0.6 * 20 - 0.5, 0.7 * 20 - 0.5))

    masks = torch.zeros(1, 2, 20, 20, dtype=torch.bool)
    masks[0, 0, 10:14, 3:9] = True
    found = Segments(torch.tensor([[0.8, 0.9]]), torch.tensor([[1, 0]]), masks)
    axes = draw_masks(torch.zeros(1, 1, 20, 20), found, names=("cat", "dog")).axes[0]
    assert [text.get_text() for text in axes.texts] == ["dog 0.80"]
    over = axes.images[1].get_array()
    assert (over[..., 3] > 0).sum() == 24 and over[12, 5, 3] > 0


def test_long_names_are_cut():
    assert shortened("cat") == "cat" and shortened("a  b\nc") == "a b c"
    assert len(shortened("x" * 99)) == 28 and shortened("x" * 99).endswith("…")


@pytest.fixture
def album(tmp_path):
    rng = np.random.default_rng(0)
    for kind, value in (("cat", 60), (HOSTILE.replace("/", "|"), 190)):
        (tmp_path / "album" / kind).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(value - 40, value + 40, (9, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "album" / kind / f"{i}.png")
    return tmp_path / "album"


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, text):
        self.words.append(text)


def _checked(text: str) -> Page:
    """A page that loads nothing, whose pictures its own policy lets show."""
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    links = {a[k] for _, a in page.tags for k in ("src", "href", "xlink:href") if a.get(k)}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)), [id for id in ids if ids.count(id) > 1]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    for link in links:
        if link.startswith("data:"):
            Image.open(io.BytesIO(base64.b64decode(link.split(",", 1)[1]))).load()
    return page


SMALL = ("model.trunk.dim=8", "model.trunk.stack.depth=1", "model.trunk.stack.block.mixer.heads=2", "task.size=8")


def _settings() -> list[str]:
    return [word for setting in (*SMALL, "loop.batch=4") for word in ("--set", setting)]


def test_a_trained_run_has_a_page_with_what_it_says(album, tmp_path, capsys):
    page, store = tmp_path / "run.html", str(tmp_path / "store")
    arguments = ["train", "vit", "--data", str(album), "--steps", "2", *_settings(), "--store", store]
    assert main([*arguments, "--report", str(page)]) == 0
    assert f"report: {page}" in capsys.readouterr().out
    text = page.read_text()
    words = " ".join(_checked(text).words)
    assert "The class that was said" in words and "Where the class token looks" in words
    assert "<script>" not in text and "cat" in words and "accuracy" in words
    assert main([*arguments, "--report", "run.txt"]) == 2
    assert ".html" in capsys.readouterr().err


def test_a_comparison_shows_the_first_pair(album, tmp_path, capsys):
    """Drawn where it was trained, once, kept with the run; the same again, and `dx report`, show the same."""
    page, store = tmp_path / "c.html", str(tmp_path / "store")
    arguments = ["compare", "vit", "vit+dyt", "--data", str(album), *_settings(), "--set", "loop.steps=4"]
    arguments += ["--budget", "smoke", "--ladder", "off", "--store", store, "--workers", "1"]
    assert main([*arguments, "--report", str(page)]) == 0
    text = page.read_text()
    words = " ".join(_checked(text).words)
    assert "What they make of held-out pictures" in words and words.count("The class that was said") == 2
    record = next(iter(Store(store).records("comparison").values()))
    assert list(record["pictures"]) == ["vit", "vit+dyt"]
    capsys.readouterr()
    assert main(["report", "--to", str(tmp_path / "again.html"), "--store", store]) == 0
    assert (tmp_path / "again.html").read_text() == text
    del record["pictures"]  # as an earlier deltax stored it
    assert "What they make" not in report.html(record)


def test_boxes_of_a_user_bear_the_names_of_their_classes(tmp_path):
    folder = tmp_path / "coco"
    folder.mkdir()
    images, annotations = [], []
    for i in range(12):
        picture = Image.new("L", (20, 14), i)
        ImageDraw.Draw(picture).rectangle([2 + i % 3, 3, 9, 10], fill=240)
        picture.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 20, "height": 14})
        annotations.append({"id": i, "image_id": i, "category_id": 5, "bbox": [2, 3, 8, 8]})
    told = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": HOSTILE}]}
    (folder / "a.json").write_text(json.dumps(told))
    tree = recipe("detr", (f"task.source={folder}",))
    task = task_of(tree)
    model = build(tree(), task, 0)

    def detect(pictures):
        box = torch.tensor([0.3, 0.3, 0.4, 0.4]).expand(len(pictures), 1, 4)
        return Detections(torch.ones(len(pictures), 1), torch.zeros(len(pictures), 1, dtype=torch.int64), box)

    model.detect = detect
    [(_, svg)] = pictures(tree, task, model).items()
    assert "<script>" not in svg and "&lt;script&gt;" in svg
