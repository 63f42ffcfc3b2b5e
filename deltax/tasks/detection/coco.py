"""Pictures with boxes around what is in them, described in COCO's JSON (https://cocodataset.org/#format-data).

pets.json, or a folder with one     its pictures lie beside it or under `images`; a tenth of them is held out for
                                    validation and a tenth sealed, by content
a folder with several               what is held out is what a name with `val` describes, sealed what one with `test`
                                    does; files may lie under `annotations`, pictures under `train2017` and the like
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image

from deltax.errors import DataWarning, UserError, nearest
from deltax.tasks.detection.scenes import NOTHING, Batch, Scenes
from deltax.tasks.images.digits import SPLITS
from deltax.tasks.images.pictures import FAULTS, read_picture, report
from deltax.tasks.task_spec import ImageSpec

EMPTY = ("keep", "skip", "stop")


@dataclass(frozen=True, eq=False)
class Photos:
    """The pictures of a source that could be read, each fitted into the upper left of a square.

    pixels   uint8 (N, size, size, C), grey where the picture does not reach
    boxes    for each picture (M, 4), (cx, cy, w, h) with the square as 1
    labels   for each picture (M,), into `classes`
    outlines for each picture what the file says of the shape of its M objects; `deltax.tasks.detection.masks` reads it
    classes  the names of the categories that are trained on, by their id
    names    the file name of each picture
    rows     the pictures of train, validation and sealed, ascending
    skipped  one sentence for each fault, and `empty` the pictures without an object
    unseen   the categories that are listed and of which no picture shows any
    """

    name: str
    pixels: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    outlines: "list[list[Outline]]"
    classes: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class Outline(NamedTuple):
    """An annotation's `segmentation` as it stands in the file, whose it is, and the size of its picture."""

    told: Any
    what: str
    high: int
    wide: int


def load(
    source: str, *, size: int = 32, channels: int | None = None, faults: str = "stop", empty: str = "keep"
) -> Photos:
    """The pictures and boxes of a COCO JSON file, or of a folder with such files.

    channels  1 or 3; None takes 1 where every picture is grey
    faults    "stop" at a picture that is missing or corrupt, a box without area or outside its picture, an id that
              nothing has or that two images or categories share, and a class that is held out but not trained on;
              "skip" leaves these out, and clips boxes that are partly inside
    empty     pictures without an object: "keep" them as scenes where nothing is to be found, "skip" or "stop"

    Crowds (iscrowd = 1) are left out. Annotations' own ids are not used. Raises UserError, one sentence with the fix.
    """
    for word, value, known in (("faults", faults, FAULTS), ("empty", empty, EMPTY)):
        if value not in known:
            raise UserError(f"{word} is one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is 1 or 3, not {channels!r}")
    root = Path(os.path.abspath(os.path.expanduser(source)))
    if not source.strip() or not root.exists():
        hint = nearest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"no file or folder {source!r}{hint}: give a COCO JSON file or a folder that holds one")
    stamp = tuple(sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in _files(root)))
    photos = _load(root, stamp, size, channels, faults, empty)
    report(photos.name, photos.skipped, faults)
    if photos.empty:
        some = "; ".join(photos.empty[:3]) + (f"; and {len(photos.empty) - 3} more" if len(photos.empty) > 3 else "")
        if empty == "stop":
            raise UserError(f"{some} (in {photos.name}; --set task.empty=keep or skip goes on)")
        if empty == "keep":
            kept = "kept as scenes where nothing is to be found; --set task.empty=skip or stop does otherwise"
            warnings.warn(f"{some} (in {photos.name}): {kept}", DataWarning, stacklevel=2)
    if photos.unseen:
        some, more = ", ".join(photos.unseen[:3]), len(photos.unseen) - 3
        some += f" and {more} more" if more > 0 else ""
        warnings.warn(
            f"no picture of {photos.name} shows {some}: nothing is learned of that", DataWarning, stacklevel=2
        )
    return photos


class CocoScenes(Scenes):
    """`Scenes`, but of a user's pictures where `source` is what `load` takes; None is the scenes of digits.

    A picture is fitted into size x size; boxes keep their shape, so precision is what it is on the picture itself.
    `channels`, `faults` and `empty` are those of `load`. Pictures are drawn with equal chance.
    """

    def __init__(
        self, *, source: str | None = None, channels: int | None = None, faults: str = "stop", empty: str = "keep",
        size: int = 32, most: int = 3, classes: int = 10, held_out: int = 256,
    ):  # fmt: skip
        super().__init__(size=size, most=most, classes=classes, held_out=held_out)
        self._photos = None
        if source is not None:
            self._photos = load(source, size=size, channels=channels, faults=faults, empty=empty)
            self.classes = len(self._photos.classes)
            self.most = max(1, *(len(labels) for labels in self._photos.labels))

    @property
    def task_spec(self) -> ImageSpec:
        channels = 1 if self._photos is None else self._photos.pixels.shape[-1]
        return {**super().task_spec, "channels": channels}

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes))) if self._photos is None else self._photos.classes

    def held_out_documents(self, split: str = "validation") -> Int64[np.ndarray, "scenes"]:
        return np.arange(self.held_out if self._photos is None else len(self._chosen(split)))

    @property
    def fingerprint(self) -> str:
        if self._photos is None:
            return super().fingerprint
        photos = self._photos
        digest = hashlib.sha256(f"{self.size} {self.held_out} {photos.classes}".encode() + photos.pixels.tobytes())
        for split in SPLITS:
            digest.update(photos.rows[split].astype("<i8").tobytes())
        for boxes, labels in zip(photos.boxes, photos.labels, strict=True):
            digest.update(boxes.astype("<f8").tobytes() + labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _compose(self, split: str, count: int, key: np.ndarray) -> Batch:
        if self._photos is None:
            return super()._compose(split, count, key)
        rows = self._drawn(split, count, key)
        images = torch.from_numpy(self._photos.pixels[rows].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        boxes = torch.zeros(len(rows), self.most, 4)
        labels = torch.full((len(rows), self.most), NOTHING)
        for i, row in enumerate(rows):
            found = len(self._photos.labels[row])
            boxes[i, :found] = torch.from_numpy(self._photos.boxes[row]).float()
            labels[i, :found] = torch.from_numpy(self._photos.labels[row])
        objects = torch.full((len(rows),), float((labels >= 0).sum()) / max(1, len(rows)))
        return Batch(images, boxes, labels, objects)

    def _drawn(self, split: str, count: int, key: np.ndarray) -> np.ndarray:
        """The pictures of a batch."""
        rows = self._chosen(split)
        if split != "train":
            return rows
        draws = np.random.Philox(key=key).random_raw(count)
        return rows[(draws % np.uint64(len(rows))).astype(np.int64)]

    def _chosen(self, split: str) -> np.ndarray:
        assert self._photos is not None
        rows = self._photos.rows[split]
        return rows if split == "train" else rows[: self.held_out]


@dataclass
class _Reading:
    """What has been read so far of a source."""

    size: int
    pixels: list[np.ndarray] = field(default_factory=list)
    boxes: list[list[list[float]]] = field(default_factory=list)
    categories: list[list[str]] = field(default_factory=list)
    outlines: list[list[Outline]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)  # the classes by name, with their id

    def file(self, path: Path, root: Path, split: str | None) -> None:
        """One JSON file with its pictures."""
        name = path.name
        told = _json(path)
        images = self.listed(told, "images", name)
        categories = self.listed(told, "categories", name)
        known = {key: str(category.get("name", key)) for key, category in categories.items()}
        self.order |= {word: key if isinstance(key, int) else 0 for key, word in known.items()}
        shared = [{_key(i) for i in told[word] if isinstance(i, dict)} for word in ("images", "categories")]
        of_image: dict[Any, list[dict]] = {key: [] for key in images}
        for n, it in enumerate(told["annotations"]):
            if not isinstance(it, dict):
                self.faults.append(f"{name}: annotations[{n}] is no object but {it!r}: take it out")
                continue
            what, (image, category) = f"{name}: annotation {it.get('id')}", (_key(it, f"{w}_id") for w in _NAMED)
            if image not in shared[0]:
                fault = f"{what} is of image {image!r}, which is not among the images: list the image or take this out"
                self.faults.append(fault)
            elif category not in shared[1]:
                of = f" of {images[image].get('file_name')}" if image in images else ""
                self.faults.append(
                    f"{what}{of} has category {category!r}, which is not listed: list it or take this out"
                )
            elif image in images and category in categories and not it.get("iscrowd"):
                of_image[image].append(it)
        for key, image in images.items():
            self.picture(image, of_image[key], known, _folders(path, root), name, split)

    def listed(self, told: dict[str, list], word: str, name: str) -> dict[Any, dict]:
        """The images or categories of a file by their id; two that share one are left out, as it cannot be told which
        of them an annotation means."""
        found: dict[Any, list[dict]] = {}
        for n, it in enumerate(told[word]):
            if isinstance(it, dict):
                found.setdefault(_key(it), []).append(it)
            else:
                self.faults.append(f"{name}: {word}[{n}] is no object but {it!r}: take it out")
        for key, its in found.items():
            if len(its) > 1:
                of = " and ".join(str(it.get("file_name", it.get("name"))) for it in its[:3])
                self.faults.append(f"{name}: {len(its)} {word} have the id {key!r}, {of}: give each its own")
        return {key: its[0] for key, its in found.items() if len(its) == 1}

    def picture(
        self, image: dict, annotations: list[dict], known: dict, folders: list[Path], name: str, split: str | None
    ) -> None:
        title = str(image.get("file_name"))
        path = next((folder / title for folder in folders if (folder / title).is_file()), None)
        if path is None:
            self.faults.append(f"{name}: there is no picture {title}: put it beside the file or under images")
            return
        try:
            pixels = read_picture(path, title)
        except UserError as error:
            self.faults.append(str(error))
            return
        high, wide = pixels.shape[:2]
        if (image.get("width") or wide, image.get("height") or high) != (wide, high):
            said = f"{image.get('width')} x {image.get('height')}"
            self.faults.append(
                f"{title} is {wide} x {high} pixels, but {name} says {said}: its boxes cannot be placed, export again"
            )
            return
        boxes, categories, outlines = [], [], []
        for it in annotations:
            box, fault = _inside(it.get("bbox"), wide, high)
            what = f"{title}: annotation {it.get('id')} of {name}"
            if fault:
                self.faults.append(f"{what} {fault}")
            if box is not None:
                x, y, w, h = (v / max(wide, high) for v in box)
                boxes.append([x + w / 2, y + h / 2, w, h])
                categories.append(known[_key(it, "category_id")])
                outlines.append(Outline(it.get("segmentation"), what, high, wide))
        self.pixels.append(_letterbox(pixels, self.size))
        self.boxes.append(boxes)
        self.categories.append(categories)
        self.outlines.append(outlines)
        self.names.append(title)
        self.split.append(split)


_NAMED = ("image", "category")


def _key(of: dict, word: str = "id") -> Any:
    """An id as a key, whatever stands there."""
    key = of.get(word)
    return key if isinstance(key, int | str) else repr(key)


@lru_cache(maxsize=4)
def _load(root: Path, stamp: tuple, size: int, channels: int | None, faults: str, empty: str) -> Photos:
    files = _annotations(root)
    if not files:
        raise UserError(f"no COCO JSON in {root.name}: one has lists of images, annotations and categories")
    reading = _Reading(size)
    for path, split in files:
        reading.file(path, root if root.is_dir() else root.parent, split)
    keep = [i for i, boxes in enumerate(reading.boxes) if boxes or empty != "skip"]
    if not any(reading.boxes):
        first = f" ({reading.faults[0]})" if reading.faults else ""
        raise UserError(f"no picture of {root.name} has an object in it that can be learned{first}")
    without = tuple(f"{reading.names[i]} has no object" for i, boxes in enumerate(reading.boxes) if not boxes)
    wide = channels or max(p.shape[-1] for p in reading.pixels)
    pixels = np.stack([_channels(reading.pixels[i], wide) for i in keep])
    rows = _split([reading.split[i] for i in keep], pixels, root.name)
    trained = {word for row in rows["train"] for word in reading.categories[keep[row]]}
    classes = tuple(sorted(trained, key=lambda word: (reading.order.get(word, 0), word)))
    boxes, labels, outlines = [], [], []
    for i in keep:
        things = zip(reading.boxes[i], reading.categories[i], reading.outlines[i], strict=True)
        found = [(box, classes.index(word), outline) for box, word, outline in things if word in trained]
        for word in sorted(set(reading.categories[i]) - trained):
            reading.faults.append(
                f"{reading.names[i]} is held out and shows a {word}, which no picture to train on shows: add one"
            )
        boxes.append(np.array([box for box, _, _ in found], dtype=np.float64).reshape(-1, 4))
        labels.append(np.array([label for _, label, _ in found], dtype=np.int64))
        outlines.append([outline for *_, outline in found])
    names = tuple(reading.names[i] for i in keep)
    shown = {word for words in reading.categories for word in words}
    unseen = tuple(word for word in reading.order if word not in shown)
    if not classes:
        raise UserError(f"no picture to train on in {root.name} has an object in it: add some to its training part")
    return Photos(
        root.name, pixels, boxes, labels, outlines, classes, names, rows, tuple(reading.faults), without, unseen
    )


def _json(path: Path) -> dict[str, list[dict]]:
    """A COCO file's images, annotations and categories. Raises UserError where it is none."""
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{path.name} is no JSON ({error}): export the annotations again") from error
    for word in ("images", "annotations", "categories"):
        if not isinstance(told, dict) or not isinstance(told.get(word), list):
            raise UserError(
                f"{path.name} has no list of {word}: COCO's format wants images, annotations and categories"
            )
    return told


def _annotations(root: Path) -> list[tuple[Path, str | None]]:
    """The COCO files of a source and the split that each is for; None leaves that to the pictures."""
    if root.is_file():
        return [(root, None)]
    found = [p for p in (*sorted(root.glob("*.json")), *sorted(root.glob("annotations/*.json"))) if _is_coco(p)]
    told = {p: "validation" if "val" in p.stem else "sealed" if "test" in p.stem else "train" for p in found}
    return [(p, told[p] if len(set(told.values())) > 1 else None) for p in found]


def _is_coco(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"images"' in file.read() and "caption" not in path.stem and "keypoint" not in path.stem


def _folders(path: Path, root: Path) -> list[Path]:
    """Where the pictures of a file may lie."""
    beside = [path.parent, path.parent / "images", root, root / "images"]
    return [*beside, *(p for p in sorted(root.iterdir()) if p.is_dir() and p.name in path.stem)]


def _files(root: Path) -> Iterator[Path]:
    folder = root if root.is_dir() else root.parent
    return (p for p in folder.rglob("*") if p.is_file())


def _inside(box: Any, wide: int, high: int) -> tuple[list[float] | None, str]:
    """A box (x, y, w, h) clipped to its picture, or None where nothing is left, and what is wrong with it."""
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError):
        return None, f"has no bbox of four numbers but {box!r}: write x, y, width, height"
    if not (np.isfinite([x, y, w, h]).all() and w > 0 and h > 0):
        return None, f"has a box without area, {box}: draw it again or take it out"
    clipped = [max(x, 0.0), max(y, 0.0), min(x + w, wide) - max(x, 0.0), min(y + h, high) - max(y, 0.0)]
    if min(clipped[2:]) <= 0:
        return None, f"has its box {box} outside the picture of {wide} x {high}: move it or take it out"
    # Half a pixel is how annotators round.
    beyond = max(-x, -y, x + w - wide, y + h - high) > 0.5
    return clipped, f"has its box {box} partly outside the picture of {wide} x {high}: clip it" if beyond else ""


def _letterbox(pixels: np.ndarray, size: int) -> np.ndarray:
    """The whole picture in the upper left of a grey square, its longer side as long as the square."""
    high, wide = pixels.shape[:2]
    scale = size / max(high, wide)
    shape = max(1, round(wide * scale)), max(1, round(high * scale))
    small = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).resize(
        shape, Image.Resampling.BILINEAR
    )
    square = np.full((size, size, pixels.shape[-1]), 128, dtype=np.uint8)
    square[: shape[1], : shape[0]] = np.asarray(small).reshape(shape[1], shape[0], -1)
    return square


def _channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, -1)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def _split(told: list[str | None], pixels: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Rows by split, as the files say, or by the pictures' own pixels: equal pictures share one.

    Raises UserError where a split is left without a picture.
    """
    keys = np.array([int.from_bytes(hashlib.sha256(p.tobytes()).digest()[:8], "big") / 2.0**64 for p in pixels])
    where = np.digitize(keys, (0.8, 0.9))
    for i, split in enumerate(told):
        if split is not None:
            where[i] = SPLITS.index(split)
    if all(split is not None for split in told):
        if not (where == 2).any():  # no sealed part of its own: half of what is held out
            held = np.flatnonzero(where == 1)
            where[held[keys[held].argsort(kind="stable")[len(held) // 2 :]]] = 2 if len(held) > 1 else 1
        if not (where == 1).any():
            where[np.flatnonzero(where == 2)[: (where == 2).sum() // 2]] = 1
    elif len(set(where)) < 3:  # a small source: by rank
        distinct = np.unique(keys)
        tenth, rank = max(1, len(distinct) // 10), len(distinct) - np.searchsorted(distinct, keys)
        where = (rank <= 2 * tenth).astype(int) + (rank <= tenth)
    for i, split in enumerate(SPLITS):
        if not (where == i).any():
            raise UserError(f"{name} has no picture for {split}: add some, or give one file and let it be split")
    return {split: np.flatnonzero(where == i) for i, split in enumerate(SPLITS)}
