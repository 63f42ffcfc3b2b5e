"""Scenes of handwritten digits: where is what? Composed from scikit-learn's digits, so there is nothing to download."""

import contextlib
import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from deltax.errors import UserError, nearest
from deltax.parts.detection.boxes import Detections, corners
from deltax.shapes import Images, PerExample
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import SPLITS, Digits
from deltax.tasks.task_spec import ImageSpec

NOTHING = -1  # the label of a row that only fills up


class Batch(NamedTuple):
    """Images and what is in them.

    images   (B, 1, size, size), from -1 for paper to 1 for ink
    boxes    (B, N, 4), (cx, cy, w, h) in [0, 1], around the ink of each object
    labels   (B, N), the digit, or -1 where a scene has fewer than N objects
    objects  (B,), how many objects a scene of the whole batch has on average: a loss that divides by it is the same
             when the batch is read in pieces
    """

    images: Images
    boxes: Float[Tensor, "B N 4"]
    labels: Int64[Tensor, "B N"]
    objects: PerExample

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[Batch]":
        """The batch in `count` pieces along its scenes."""
        return [Batch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every scene counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


class Scenes:
    """Find the digits of a scene. The interface is that of `tasks.language.text.Text`; a batch's tokens are its scenes.

    size is the side of an image in pixels; the digits are those below `classes`. A scene is to have 0 to `most`
    objects, each number equally often, and has fewer where no room is left: digits are scaled to one of `sides` pixels,
    and no two boxes overlap by more than 0.1 IoU. Digits of the validation and sealed splits never stand in a training
    scene. held_out is the number of scenes to evaluate on. Raises UserError for an image too small, and where
    pycocotools, which computes the precision, is missing.
    """

    unit = "set loss"

    def __init__(
        self, *, size: int = 32, most: int = 3, classes: int = 10, held_out: int = 256,
        sides: tuple[int, ...] = (9, 12, 15),
    ):  # fmt: skip
        for name, value, least in (
            ("size", size, 16),
            ("most", most, 1),
            ("classes", classes, 1),
            ("held_out", held_out, 1),
        ):
            if type(value) is not int or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not sides or not all(type(side) is int and 8 <= side <= size for side in sides):
            raise UserError(f"sides are whole numbers from 8 to {size}, the size of a scene, not {sides!r}")
        if classes > 10:
            raise UserError(f"there are 10 digits, not {classes}: classes is at most 10")
        if importlib.util.find_spec("pycocotools") is None:
            raise UserError("average precision needs pycocotools: pip install 'deltax-ml[detection]'")
        self.size, self.most, self.classes, self.held_out, self.sides = size, most, classes, held_out, tuple(sides)

    @property
    def task_spec(self) -> ImageSpec:
        return {"channels": 1, "size": self.size, "classes": self.classes}

    def batch(self, step: int, *, size: int, seed: int) -> Batch:
        """New scenes of training digits. Philox keyed by (seed, step), both in [0, 2**64), draws them; a smaller batch
        has the first scenes of a larger one."""
        return self._compose("train", size, np.array([seed, step], dtype=np.uint64))

    def tokens(self, size: int) -> int:
        return size

    def held_out_batches(self, size: int, split: str = "validation") -> Iterator[Batch]:
        """The same scenes every time; `objects` is the mean over all of them."""
        if split not in SPLITS[1:]:
            raise UserError(f"no held-out split {split!r}{nearest(split, SPLITS[1:])}: validation or sealed")
        whole = self._compose(split, self.held_out, np.array([0, SPLITS.index(split)], dtype=np.uint64))
        yield from (type(whole)(*piece) for piece in zip(*(tensor.split(size) for tensor in whole), strict=True))

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "scenes"]:
        """Every scene is a document of its own."""
        return np.arange(self.held_out)

    def score(self, loss: float) -> float:
        return loss

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The loss a scene; in `metrics` AP and AP50, from 0 to 1, of a model that can `detect`."""
        found = held_out(self, model, objective, split=split)
        if not hasattr(model, "detect"):
            return found
        device = next(model.parameters()).device
        return replace(found, metrics=self.precision(model.detect, split, device=device))

    @torch.inference_mode()
    def precision(
        self, detect: Callable[[Images], Detections], split: str = "validation", *, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """AP, the mean over IoU thresholds from 0.5 to 0.95 of the average precision, and AP50, by pycocotools.

        `detect` is given images on the device.
        """
        batches = list(self.held_out_batches(64, split))
        found = [Detections(*(t.cpu() for t in detect(batch.images.to(device)))) for batch in batches]
        return average_precision(found, batches, self.size)

    def chance(self, split: str = "validation") -> dict[str, float]:
        """The `precision` of answering each scene with the objects of the one after it, all at full score."""
        batches = list(self.held_out_batches(64, split))
        boxes, labels = (
            torch.cat(list(t)).roll(-1, 0) for t in zip(*((b.boxes, b.labels) for b in batches), strict=True)
        )
        said = Detections((labels >= 0).float(), labels.clamp(min=0), boxes)
        pieces = (Detections(*piece) for piece in zip(*(t.split(64) for t in said), strict=True))
        return average_precision(list(pieces), batches, self.size)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the digits, the way they are put together, and the held-out scenes."""
        digest = hashlib.sha256(
            f"{Digits().fingerprint} {self.size} {self.most} {self.classes} {self.held_out}".encode()
        )
        for batch in (self.batch(0, size=8, seed=0), *self.held_out_batches(self.held_out)):
            digest.update(batch.images.numpy().tobytes() + batch.boxes.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _compose(self, split: str, count: int, key: np.ndarray) -> Batch:
        return compose(list(self._layouts(split, count, key)), self.size, self.most)

    def _layouts(self, split: str, count: int, key: np.ndarray) -> "Iterator[Layout]":
        """What stands where in each of `count` scenes of a split."""
        glyphs = _glyphs(split, self.classes, self.sides)
        for i in range(count):
            draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, i]))
            taken, layout = np.zeros((0, 4)), []
            for _ in range(draw.integers(self.most + 1)):
                ink, label = glyphs[draw.integers(len(glyphs))]
                box = _room(taken, ink.shape, self.size, draw)
                if box is None:
                    continue
                layout.append((ink, label, box))
                taken = np.concatenate([taken, [box]])
            yield layout


Layout = list[tuple[np.ndarray, int, np.ndarray]]  # of each object its ink, its digit, and its corners in pixels


def compose(layouts: Sequence[Layout], size: int, most: int) -> Batch:
    """Scenes of `size` x `size` pixels as they are laid out; where two objects meet, the darker ink shows."""
    images = np.full((len(layouts), size, size), -1.0, dtype=np.float32)
    boxes = np.zeros((len(layouts), most, 4), dtype=np.float32)
    labels = np.full((len(layouts), most), NOTHING, dtype=np.int64)
    for i, layout in enumerate(layouts):
        for k, (ink, label, (x0, y0, x1, y1)) in enumerate(layout):
            images[i, y0:y1, x0:x1] = np.maximum(images[i, y0:y1, x0:x1], ink)
            labels[i, k] = label
            boxes[i, k] = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / size
    objects = torch.full((len(layouts),), float((labels >= 0).sum()) / max(1, len(layouts)))
    return Batch(torch.from_numpy(images)[:, None], torch.from_numpy(boxes), torch.from_numpy(labels), objects)


def average_precision(found: Sequence[Detections], truth: Sequence[Batch], size: int) -> dict[str, float]:
    """AP and AP50 of detections, batch by batch, on images `size` pixels wide and high, by pycocotools.

    Raises UserError where pycocotools is missing.
    """
    objects, answers, images = [], [], 0
    for said, batch in zip(found, truth, strict=True):
        for i in range(len(batch.labels)):
            for label, box in zip(batch.labels[i].tolist(), _pixels(batch.boxes[i], size), strict=True):
                if label >= 0:
                    objects.append({"image_id": images, "category_id": label, "bbox": box, "iscrowd": 0})
                    objects[-1] |= {"id": len(objects), "area": box[2] * box[3]}
            rows = zip(said.scores[i].tolist(), said.labels[i].tolist(), _pixels(said.boxes[i], size), strict=True)
            answers += [{"image_id": images, "category_id": c, "bbox": b, "score": s} for s, c, b in rows if s > 0]
            images += 1
    return judge(objects, answers, [{"id": i} for i in range(images)], "bbox")


def judge(objects: list[dict], answers: list[dict], images: list[dict], kind: str) -> dict[str, float]:
    """AP and AP50 of answers about objects of images, all in COCO's form, by pycocotools; `kind` is "bbox" or "segm".

    Raises UserError where pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError("average precision needs pycocotools: pip install 'deltax-ml[detection]'") from None

    if not objects or not answers:
        return {"AP": 0.0, "AP50": 0.0}
    categories = sorted({thing["category_id"] for thing in objects})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": images,
            "annotations": objects,
            "categories": [{"id": c} for c in categories],
        }
        coco.createIndex()
        judged = COCOeval(coco, coco.loadRes(answers), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {"AP": float(judged.stats[0]), "AP50": float(judged.stats[1])}


def draw(
    images: Images,
    found: Detections,
    truth: Batch | None = None,
    *,
    threshold: float = 0.5,
    names: Sequence[str] | None = None,
    light: str = "paper",
) -> Figure:
    """Up to eight images with what was found in them: solid boxes with class and score, dashed ones for the truth.

    names  of the classes; their numbers without
    light  that of `framed`
    """
    figure, panels = gallery(images, light=light)
    wide, high = images.shape[-1], images.shape[-2]
    for i, axes in enumerate(panels):
        if truth is not None:
            for box in corners(truth.boxes[i][truth.labels[i] >= 0]).tolist():
                axes.add_patch(_rectangle(box, wide, high, color=TRUE, linestyle="--", path_effects=HALO))
        things = zip(*(t[i].tolist() for t in (*found[:2], corners(found.boxes))), strict=True)
        for score, label, box in sorted(things):  # the surest on top
            if score >= threshold:
                axes.add_patch(_rectangle(box, wide, high, color=f"C{label % 10}"))
                written(axes, box[0] * wide, box[1] * high, label, score, names)
    return figure


def written(axes: Axes, x: float, y: float, label: int, score: float, names: Sequence[str] | None) -> None:
    """A class and its score over what begins at (x, y), or in it where that is the upper edge; inside the image."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    high = y - top > 0.08 * (bottom - top)
    far = x > (left + right) / 2
    axes.text(
        min(max(x, left), right), max(y, top), f"{names[label] if names else label} {score:.2f}",
        color=f"C{label % 10}", fontsize=7, va="bottom" if high else "top", ha="center" if far else "left",
        clip_on=True, bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.4, "linewidth": 0},
    )  # fmt: skip


def gallery(images: Images, *, light: str = "paper") -> tuple[Figure, list[Axes]]:
    """A figure of up to eight images, and the axes that each is shown in. `light` is that of `framed`."""
    count = min(8, len(images))
    rows = -(-count // 4)
    figure = Figure(figsize=(9.6, 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 4, squeeze=False).flat)
    for axes, image in zip(panels, images, strict=False):
        framed(axes, image, light=light)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


TRUE, HALO = "0.3", [withStroke(linewidth=2.5, foreground="white")]  # seen on ink and on photographs
HIDDEN = (0.72, 0.79, 0.9)  # where an image is NaN


def framed(axes: Axes, image: Float[Tensor, "C Y X"], *, light: str = "paper") -> None:
    """One image with values in [-1, 1]: three channels as colours; one as ink on "paper", 1 for black, or, where
    `light` is "photo", as a photograph, 1 for white."""
    shade = (image.detach().float().cpu() + 1) / 2
    if len(shade) == 1:
        shade = (1 - shade if light == "paper" else shade).expand(3, -1, -1)
    pixels = shade[:3].permute(1, 2, 0).numpy().clip(0, 1)
    axes.imshow(np.where(np.isnan(pixels), np.array(HIDDEN, dtype=pixels.dtype), pixels))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def _rectangle(box: list[float], wide: int, high: int, **style: Any) -> Rectangle:
    x0, y0, x1, y1 = box[0] * wide - 0.5, box[1] * high - 0.5, box[2] * wide - 0.5, box[3] * high - 0.5
    return Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=1.2, **style)


def _pixels(boxes: Tensor, size: int) -> list[list[float]]:
    """(cx, cy, w, h) in [0, 1] as (x0, y0, w, h) in pixels."""
    return (torch.cat([corners(boxes)[..., :2], boxes[..., 2:]], -1).double() * size).tolist()


def _room(taken: np.ndarray, shape: tuple[int, int], size: int, draw: np.random.Generator) -> np.ndarray | None:
    """The corners of a place for a glyph that leaves the others visible; None when twenty draws found none."""
    high, wide = shape
    for _ in range(20):
        x, y = draw.integers(size - wide + 1), draw.integers(size - high + 1)
        box = np.array([x, y, x + wide, y + high])
        inside = np.minimum(taken[:, 2:], box[2:]) - np.maximum(taken[:, :2], box[:2])
        shared = np.clip(inside, 0, None).prod(1)
        if (shared <= 0.1 * ((taken[:, 2:] - taken[:, :2]).prod(1) + wide * high - shared)).all():
            return box
    return None


@cache
def _glyphs(split: str, classes: int, sides: tuple[int, ...] = (9, 12, 15)) -> list[tuple[np.ndarray, int]]:
    """Digits of a split below `classes`, in every size, cut to their ink: pixels from -1 to 1, and the label."""
    batch = Digits(held_out=10_000).all(split)
    found = []
    for side in sides:
        scaled = nn.functional.interpolate(batch.images, size=(side, side), mode="bilinear").clamp(-1, 1)[:, 0].numpy()
        for image, label in zip(scaled, batch.labels.tolist(), strict=True):
            if label >= classes:
                continue
            rows, columns = (np.flatnonzero((image > -0.5).any(axis)) for axis in (1, 0))
            found.append((image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], label))
    return found
