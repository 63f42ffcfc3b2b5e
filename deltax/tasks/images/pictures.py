"""Pictures in folders, one folder a class: which class does a picture show? And the reader of picture files.

pets/cat/1.png ...              a tenth of the pictures is held out for validation and a tenth sealed, by content
pets/train/cat/1.png,           what is held out is what lies under `validation` (or `val`, or `test`)
pets/validation/cat/9.png ...
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deltax.errors import DataWarning, UserError, nearest
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.digits import SPLITS, Batch, Digits
from deltax.tasks.task_spec import ImageSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT = ("validation", "val", "test")
FAULTS = ("stop", "skip")
_GREY = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I", "F")

Pixels = np.ndarray  # (Y, X, C) bytes


def read_picture(path: Path, name: str) -> Pixels:
    """The pixels of one file, uint8 (Y, X, 1) for a grey picture and (Y, X, 3) otherwise, upright and over white.

    `name` is what to call it. Raises UserError when it is no whole picture that Pillow can read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
                deep = np.asarray(picture, dtype=np.float64)
                top = 65535.0 if picture.mode != "F" else max(float(deep.max()), 1e-9)
                return np.clip(deep * (255 / top), 0, 255).astype(np.uint8)[..., None]
            grey = picture.mode in _GREY
            if picture.has_transparency_data:
                over = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(over, picture.convert("RGBA"))
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except UnidentifiedImageError as error:
        what = "is no picture" if path.stat().st_size else "is an empty file"
        raise UserError(f"{name} {what}: save it again as PNG or JPEG") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{name} has more pixels than Pillow will unpack: make it smaller") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): mend that or leave it out") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{name} is a corrupt picture ({_reason(error)}): fetch or save it again") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fitted(pixels: Pixels, size: int, channels: int) -> Pixels:
    """The middle square of a picture, at size by size, grey or in colour: uint8 (size, size, channels)."""
    from PIL import Image, ImageOps

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels)


def report(name: str, faults: Iterable[str], policy: str) -> tuple[str, ...]:
    """What is wrong with a folder: stops with the first three faults, or warns of the first ten and returns all.

    Raises UserError under "stop" where there is a fault.
    """
    faults = tuple(faults)
    shown = faults[:3] if policy == "stop" else faults[:10]
    more = f"; and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
    if faults and policy == "stop":
        raise UserError(f"{'; '.join(shown)}{more} (in {name}; --set task.faults=skip leaves such out)")
    if faults:
        warnings.warn(f"left out of {name}: {'; '.join(shown)}{more}", DataWarning, stacklevel=3)
    return faults


@dataclass(frozen=True, eq=False)
class Album:
    """The pictures of a folder that could be read.

    pixels   uint8 (N, size, size, C)
    labels   int64 (N,), into `classes`
    classes  the names of the class folders, sorted
    names    a path for each picture, relative to the folder
    rows     the pictures of train, validation and sealed, ascending
    skipped  one sentence for each fault
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()


def load(source: str, *, size: int = 32, channels: int | None = None, faults: str = "stop") -> Album:
    """The pictures under a folder of class folders, read once in a process as long as its files stay the same.

    channels  1 or 3; None takes 1 where every picture is grey
    faults    "stop" at a corrupt picture, an empty class or a class missing from training; "skip" leaves these out

    Raises UserError, one sentence with the fix.
    """
    if faults not in FAULTS:
        raise UserError(f"faults is 'stop' or 'skip', not {faults!r}")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is 1 or 3, not {channels!r}")
    root = Path(os.path.abspath(os.path.expanduser(source)))
    if not source.strip() or not root.is_dir():
        hint = nearest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"no folder {source!r}{hint}: give a folder that holds one folder of pictures for each class")
    album = _load(root, _stamps(root), size, channels, faults)
    if album.skipped:
        report(album.name, album.skipped, faults)
    return album


class Pictures(Digits):
    """`Digits`, but of a user's pictures: `source` is a folder of class folders, PNG or JPEG; None is the digits.

    A picture's middle square is brought to `size`, by default 32, and the values are in [-1, 1]. Its own pixels put
    it in train (80 %), validation (10 %) or sealed (10 %), unless the folder itself says what is held out; every
    class keeps a picture to train on. All pictures are held in memory at that size. `faults` and `channels` are
    those of `load`.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        size: int | None = None,
        channels: int | None = None,
        faults: str = "stop",
        held_out: int = 1000,
    ):
        super().__init__(held_out=held_out)
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"size must be a whole number of at least 1, not {size!r}")
        self.classes: tuple[str, ...] = tuple("0123456789")
        self.skipped: tuple[str, ...] = ()
        if source in (None, "digits"):
            if channels not in (None, 1):
                raise UserError(f"the digits have 1 channel, not {channels}")
            self._pixels, self._half = _scaled(self._pixels, size)[..., None], 8.0
        else:
            album = load(source, size=size or 32, channels=channels, faults=faults)
            self._pixels, self._labels, self._half = album.pixels, album.labels, 127.5
            self._rows = {split: of if split == "train" else of[:held_out] for split, of in album.rows.items()}
            self.classes, self.skipped = album.classes, album.skipped

    @property
    def task_spec(self) -> ImageSpec:
        _, size, _, channels = self._pixels.shape
        return {"channels": channels, "size": size, "classes": len(self.classes)}

    def _take(self, rows: np.ndarray) -> Batch:
        images = torch.from_numpy(self._pixels[rows]).movedim(-1, 1).float() / self._half - 1
        return Batch(images, torch.from_numpy(self._labels[rows].astype(np.int64)))


class Drawings(Pictures):
    """The same pictures, to be drawn: the score is whatever error the objective measures."""

    unit = "squared error"

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        return held_out(self, model, objective, split=split)


def _stamps(root: Path) -> tuple[tuple[str, int, int], ...]:
    """Every file and folder with its time and size: what tells a cached album from a changed folder."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found.append((os.path.relpath(folder, root), 0, -1))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                    found.append((os.path.relpath(path, root), status.st_mtime_ns, status.st_size))
                except OSError:
                    found.append((os.path.relpath(path, root), -1, 0))
    return tuple(found)


@lru_cache(maxsize=2)
def _load(root: Path, stamps: tuple[tuple[str, int, int], ...], size: int, channels: int | None, policy: str) -> Album:
    folders = [Path(name) for name, _, length in stamps if length == -1]
    files = [Path(name) for name, _, length in stamps if length >= 0]
    top = {f.parts[0] for f in folders if f.parts}
    held = next((name for name in HELD_OUT if name in top), None) if "train" in top else None
    places = {"train": "train", "validation": held} if held else {"train": ""}
    loose = [f for f in files if len(f.parts) == 1]
    if loose:
        raise UserError(
            f"{loose[0]} lies in no class folder: put each picture of {root.name} in one named by its class"
        )
    faults: list[str] = []
    found: list[tuple[str, str, str, int, Pixels]] = []  # split, class, name, key, pixels
    for split, place in places.items():
        depth = 1 if place else 0
        named = sorted({f.parts[depth] for f in folders if len(f.parts) == depth + 1 and f.parts[:depth] == _of(place)})
        for kind in named:
            inside = [f for f in files if f.parts[: depth + 1] == (*_of(place), kind)]
            if not inside:
                faults.append(f"{Path(place, kind)} is an empty class: put pictures in it or remove the folder")
            for file in inside:
                try:
                    whole = read_picture(root / file, file.as_posix())
                except UserError as error:
                    faults.append(str(error))
                    continue
                found.append((split, kind, file.as_posix(), content_key(whole), fitted(whole, size, whole.shape[-1])))
    trained = {kind for split, kind, *_ in found if split == "train"}
    for kind in sorted({kind for _, kind, *_ in found} - trained):
        faults.append(f"class {kind} is missing from training: put pictures of it under train or remove {held}/{kind}")
    found = [row for row in found if row[1] in trained]
    if policy == "stop":
        report(root.name, faults, policy)
    if len(trained) < 2:
        count = f"{len(trained)} class" if len(trained) == 1 else f"{len(trained)} classes"
        raise UserError(f"{root.name} holds pictures of {count}: give a folder with at least two")
    classes = tuple(sorted(trained))
    channels = channels or (1 if all(p.shape[-1] == 1 for *_, p in found) else 3)
    pixels = np.stack([fitted(p, size, channels) for *_, p in found])
    labels = np.array([classes.index(kind) for _, kind, *_ in found])
    given = np.array([SPLITS.index(split) for split, *_ in found])
    where = given if held else by_content(np.array([key for *_, key, _ in found], dtype=np.uint64), labels)
    rows = {split: np.flatnonzero(where == i) for i, split in enumerate(SPLITS)}
    if not len(rows["validation"]):
        raise UserError(f"{root.name} has too few pictures to hold some out: give at least 10 of each class")
    return Album(root.name, pixels, labels, classes, tuple(row[2] for row in found), rows, tuple(faults))


def content_key(pixels: Pixels) -> int:
    return int.from_bytes(hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()[:8], "big")


def by_content(keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The split of each picture by its content, equal pictures in one; each class keeps one to train on."""
    where = np.digitize(keys / 2.0**64, (0.80, 0.90))
    for label in np.unique(labels):
        of = np.flatnonzero(labels == label)
        if not (where[of] == 0).any():
            where[keys == keys[of].min()] = 0
    if not (where == 1).any():  # a small folder: the picture nearest to the bounds of validation that can be spared
        for i in np.argsort(np.abs(keys / 2.0**64 - 0.85)):
            if (where[labels == labels[i]] == 0).sum() > (where[i] == 0):
                where[keys == keys[i]] = 1
                break
    return where


def _of(place: str) -> tuple[str, ...]:
    return (place,) if place else ()


def _scaled(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """Images (N, Y, X) brought to size by size, bilinearly."""
    if size is None or size == pixels.shape[-1]:
        return pixels
    small = torch.from_numpy(pixels)[:, None].float()
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear", antialias=size < small.shape[-1])
    return large[:, 0].numpy()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
