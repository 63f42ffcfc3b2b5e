"""Scenes with the pixels of every object: of digits, exactly; of a user's pictures, from COCO's polygons and RLE."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from deltax.parts.detection.masks import Segments
from deltax.shapes import Images, PerExample
from deltax.tasks.detection.coco import CocoScenes, Outline
from deltax.tasks.detection.scenes import HALO, TRUE, Layout, compose, gallery, judge, written
from deltax.tasks.evaluation import Evaluation, held_out
from deltax.tasks.images.pictures import report


class MaskBatch(NamedTuple):
    """A `detection.scenes.Batch` with masks (B, N, size, size), true where an object shows; no pixel is of two of a
    scene of digits, and none of a row that only fills up."""

    images: Images
    boxes: Float[Tensor, "B N 4"]
    labels: Int64[Tensor, "B N"]
    objects: PerExample
    masks: Bool[Tensor, "B N Y X"]

    def to(self, device: torch.device | str) -> "MaskBatch":
        return MaskBatch(*(tensor.to(device) for tensor in self))

    def pieces(self, count: int) -> "list[MaskBatch]":
        """The batch in `count` pieces along its scenes."""
        return [MaskBatch(*piece) for piece in zip(*(tensor.chunk(count) for tensor in self), strict=True)]

    def weights(self) -> PerExample:
        """Every scene counts the same."""
        return torch.ones(len(self.labels), device=self.labels.device)


class MaskScenes(CocoScenes):
    """`CocoScenes`, but every object comes with its pixels, and what a model finds is judged by pixels.

    A picture's masks are fitted into the square as the picture is, and judged at that size. An annotation without a
    mask, one outside its picture or without area, and a corrupt RLE are `faults`.
    """

    def __init__(
        self, *, source: str | None = None, channels: int | None = None, faults: str = "stop", empty: str = "keep",
        size: int = 32, most: int = 3, classes: int = 10, held_out: int = 256,
    ):  # fmt: skip
        super().__init__(
            source=source, channels=channels, faults=faults, empty=empty, size=size, most=most, classes=classes,
            held_out=held_out,
        )  # fmt: skip
        self._masks: list[np.ndarray] = []
        if self._photos is not None:
            self._read_masks(faults)

    def batch(self, step: int, *, size: int, seed: int) -> MaskBatch:
        """As `CocoScenes`, with masks."""
        return super().batch(step, size=size, seed=seed)

    def evaluate(self, model: nn.Module, objective: Callable[..., Any], split: str = "validation") -> Evaluation:
        """The loss a scene; in `metrics` AP and AP50 of masks, of a model that can `segment`, and PQ, of one that can
        say whose every pixel is (`panoptic`); all from 0 to 1."""
        found = held_out(self, model, objective, split=split)
        device, metrics = next(model.parameters()).device, {}
        if hasattr(model, "segment"):
            metrics |= self.mask_precision(model.segment, split, device=device)
        if hasattr(model, "panoptic"):
            metrics |= {"PQ": self.quality(model.panoptic, split, device=device)}
        return replace(found, metrics=metrics)

    @torch.inference_mode()
    def mask_precision(
        self, segment: Callable[[Images], Segments], split: str = "validation", *, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """AP, the mean over IoU thresholds of masks from 0.5 to 0.95, and AP50, by pycocotools."""
        batches = list(self.held_out_batches(64, split))
        found = [Segments(*(t.cpu() for t in segment(batch.images.to(device)))) for batch in batches]
        return mask_precision(found, batches)

    @torch.inference_mode()
    def quality(
        self, panoptic: Callable[[Images], Tensor], split: str = "validation", *, device: torch.device | str = "cpu"
    ) -> float:
        """Panoptic quality: `panoptic` gives the class and the number of the thing at every pixel, (B, Y, X, 2)."""
        batches = list(self.held_out_batches(64, split))
        return panoptic_quality([panoptic(batch.images.to(device)).cpu() for batch in batches], batches, self.classes)

    def chance(self, split: str = "validation") -> dict[str, float]:
        """The `mask_precision` of answering each scene with the objects of the one after it, all at full score."""
        batches = list(self.held_out_batches(64, split))
        columns = zip(*((b.labels, b.masks) for b in batches), strict=True)
        labels, masks = (torch.cat(list(t)).roll(-1, 0) for t in columns)
        pieces = zip((labels >= 0).float().split(64), labels.clamp(min=0).split(64), masks.split(64), strict=True)
        return mask_precision([Segments(*piece) for piece in pieces], batches)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{super().fingerprint} masks".encode())
        for masks in self._masks:
            digest.update(np.packbits(masks).tobytes())
        return digest.hexdigest()[:16]

    def _compose(self, split: str, count: int, key: np.ndarray) -> MaskBatch:
        if self._photos is None:
            layouts = list(self._layouts(split, count, key))
            masks = visible(layouts, self.size, self.most)
            return MaskBatch(*compose(layouts, self.size, self.most), torch.from_numpy(masks))
        rows = self._drawn(split, count, key)
        masks = np.zeros((len(rows), self.most, self.size, self.size), dtype=bool)
        for i, row in enumerate(rows):
            masks[i, : len(self._masks[row])] = self._masks[row]
        return MaskBatch(*super()._compose(split, count, key), torch.from_numpy(masks))

    def _read_masks(self, policy: str) -> None:
        assert self._photos is not None
        faults, boxes, labels = [], [], []
        for outlines, box, label in zip(self._photos.outlines, self._photos.boxes, self._photos.labels, strict=True):
            read = [read_mask(outline) for outline in outlines]
            faults += [f"{o.what} {fault}" for o, (_, fault) in zip(outlines, read, strict=True) if fault]
            kept = [i for i, (mask, _) in enumerate(read) if mask is not None]
            masks = [fitted(mask, self.size) for mask, _ in read if mask is not None]
            self._masks.append(np.stack(masks) if masks else np.zeros((0, self.size, self.size), dtype=bool))
            boxes.append(box[kept])
            labels.append(label[kept])
        skipped = (*self._photos.skipped, *report(self._photos.name, faults, policy))
        self._photos = replace(self._photos, boxes=boxes, labels=labels, skipped=skipped)


def visible(layouts: Sequence[Layout], size: int, most: int) -> Bool[np.ndarray, "B N Y X"]:
    """The pixels of each object of each scene: those of its ink, above -0.5, where no other has darker; of two alike
    the first has it."""
    masks = np.zeros((len(layouts), most, size, size), dtype=bool)
    for i, layout in enumerate(layouts):
        ink = np.full((len(layout), size, size), -1.0, dtype=np.float32)
        for k, (glyph, _, (x0, y0, x1, y1)) in enumerate(layout):
            ink[k, y0:y1, x0:x1] = glyph
        if layout:
            masks[i, : len(layout)] = (np.arange(len(layout))[:, None, None] == ink.argmax(0)) & (ink > -0.5)
    return masks


def read_mask(outline: Outline) -> tuple[np.ndarray | None, str]:
    """A mask (high, wide) from COCO's polygons or RLE, or None where nothing can be learned, and what is wrong."""
    from pycocotools import mask as coco

    told, high, wide = outline.told, outline.high, outline.wide
    fault = ""
    if isinstance(told, dict):
        counts, fault = _runs(told, high, wide)
        if fault:
            return None, fault
        rle = coco.frPyObjects({"size": [high, wide], "counts": counts}, high, wide)
    elif isinstance(told, list) and told:
        fault = _beyond(told, high, wide)
        if fault and "partly" not in fault:
            return None, fault
        rle = coco.merge(coco.frPyObjects([[float(v) for v in polygon] for polygon in told], high, wide))
    else:
        return None, "has no segmentation of polygons or RLE: add one, or train on boxes"
    mask = coco.decode(rle).astype(bool)
    return (mask, fault) if mask.any() else (None, "has a mask without area")


def _beyond(polygons: list, high: int, wide: int) -> str:
    """What is wrong with polygons of a picture, if anything is."""
    try:
        points = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    except (TypeError, ValueError):
        return "has a polygon that is no list of x, y, x, y, ..."
    if any(len(p) < 3 or not np.isfinite(p).all() for p in points):
        return "has a polygon of fewer than three points"
    x, y = np.concatenate(points).T
    if x.max() <= 0 or y.max() <= 0 or x.min() >= wide or y.min() >= high:
        return f"has its mask outside the picture of {wide} x {high}"
    # Half a pixel is how annotators round.
    beyond = max(-x.min(), -y.min(), x.max() - wide, y.max() - high) > 0.5
    return f"has its mask partly outside the picture of {wide} x {high}" if beyond else ""


def _runs(told: dict, high: int, wide: int) -> tuple[list[int], str]:
    """The runs of an RLE, checked before the library, which trusts them, sees them; and what is wrong."""
    if list(told.get("size", ())) != [high, wide]:
        return [], f"has an RLE of size {told.get('size')} for a picture of [{high}, {wide}]"
    counts = told.get("counts")
    try:
        runs = _unpacked(counts) if isinstance(counts, str | bytes) else [int(v) for v in counts]  # type: ignore[union-attr]
    except (TypeError, ValueError, IndexError):
        return [], "has a corrupt RLE: its counts cannot be read"
    if any(run < 0 for run in runs) or sum(runs) != high * wide:
        return [], f"has a corrupt RLE: its runs cover {sum(runs)} of {high * wide} pixels"
    return runs, ""


def _unpacked(counts: str | bytes) -> list[int]:
    """COCO's compressed runs: five bits a character, least first, from the third run on as the difference from the
    last but one."""
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = text[at] - 48
            if not 0 <= bits < 64:
                raise ValueError(f"no such character as {text[at]}")
            value |= (bits & 0x1F) << shift
            more, at, shift = bool(bits & 0x20), at + 1, shift + 5
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def fitted(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask in the upper left of a square, as its picture is: pixels that it covers half, or else most."""
    high, wide = mask.shape
    scale = size / max(high, wide)
    shape = max(1, round(wide * scale)), max(1, round(high * scale))
    small = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(shape, Image.Resampling.BILINEAR))
    square = np.zeros((size, size), dtype=bool)
    square[: shape[1], : shape[0]] = small >= max(1, min(128, small.max()))
    return square


def mask_precision(found: Sequence[Segments], truth: Sequence[MaskBatch]) -> dict[str, float]:
    """AP and AP50 of masks, batch by batch, by pycocotools."""
    from pycocotools import mask as coco

    pack = lambda mask: coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    objects: list[dict] = []
    answers: list[dict] = []
    images: list[dict] = []
    for said, batch in zip(found, truth, strict=True):
        for i in range(len(batch.labels)):
            for label, mask in zip(batch.labels[i].tolist(), batch.masks[i], strict=True):
                if label >= 0:
                    rle = pack(mask)
                    objects.append({"image_id": len(images), "category_id": label, "iscrowd": 0, "segmentation": rle})
                    objects[-1] |= {"id": len(objects), "area": float(coco.area(rle)), "bbox": list(coco.toBbox(rle))}
            for score, label, mask in zip(said.scores[i].tolist(), said.labels[i].tolist(), said.masks[i], strict=True):
                if score > 0 and mask.any():
                    answers.append({"image_id": len(images), "category_id": label, "segmentation": pack(mask)})
                    answers[-1]["score"] = score
            images.append({"id": len(images), "height": batch.masks.shape[-2], "width": batch.masks.shape[-1]})
    return judge(objects, answers, images, "segm")


def panoptic_quality(found: Sequence[Int[Tensor, "_ Y X 2"]], truth: Sequence[MaskBatch], classes: int) -> float:
    """The mean of sum IoU / (TP + FP / 2 + FN / 2) over the classes that are there or are named (arXiv:1801.00868).

    `found` holds the class and the number of the thing at every pixel, -1 where there is none. A thing is right, TP,
    where it has its class and more than half the union with an object; FP are the other things, FN the other objects.
    """
    overlap, things = (torch.zeros(classes, dtype=torch.float64) for _ in range(2))
    for said, batch in zip(found, truth, strict=True):
        (mine, my_class), (real, real_class) = _things(said), _things(whose(batch))
        both = torch.einsum("bnp,bmp->bnm", mine, real)
        either = mine.sum(-1)[:, :, None] + real.sum(-1)[:, None] - both
        share = both / either.clamp(min=1)
        hit = (share > 0.5) & (my_class[:, :, None] == real_class[:, None])
        of = my_class[:, :, None].expand_as(hit)[hit]
        overlap.index_add_(0, of, share[hit])
        for label in (my_class, real_class):
            things += torch.bincount(label[label >= 0], minlength=classes)
    there = things > 0  # TP + FP / 2 + FN / 2 is half of all things and objects
    return float((2 * overlap[there] / things[there]).mean()) if there.any() else 0.0


def _things(said: Int[Tensor, "B Y X 2"]) -> tuple[Float[Tensor, "B N P"], Int[Tensor, "B N"]]:
    """The pixels and the class of each thing by its number; class -1 where no pixel has that number."""
    label, number = said.flatten(1, 2).unbind(-1)
    each = nn.functional.one_hot(number + 1)[..., 1:].mT
    return each.double(), torch.where(each.bool(), label[:, None], -1).amax(-1)


def whose(batch: MaskBatch) -> Int[Tensor, "B Y X 2"]:
    """The class and the number of the object at every pixel, -1 where there is none."""
    number = torch.where(batch.masks.any(1), batch.masks.int().argmax(1), -1)
    label = batch.labels.gather(1, number.clamp(min=0).flatten(1)).view_as(number)
    return torch.stack([torch.where(number >= 0, label, -1), number], -1)


def draw_masks(
    images: Images,
    found: Segments,
    truth: MaskBatch | None = None,
    *,
    threshold: float = 0.5,
    names: Sequence[str] | None = None,
    light: str = "paper",
) -> Figure:
    """Up to eight images with what was found in them: the pixels of each thing, its class and score, in a colour of
    its class; dashed outlines for the truth. `names` and `light` are those of `deltax.tasks.detection.scenes.draw`."""
    figure, panels = gallery(images, light=light)
    for i, axes in enumerate(panels):
        for k in found.scores[i].argsort().tolist():  # the surest on top
            score, label, mask = found.scores[i, k].item(), int(found.labels[i, k]), found.masks[i, k]
            if score < threshold or not mask.any():
                continue
            axes.imshow(mask.numpy(force=True)[..., None] * np.array(to_rgba(f"C{label % 10}", 0.55)))
            y, x = mask.nonzero()[0].tolist()
            written(axes, x, y, label, score, names)
        for mask in () if truth is None else truth.masks[i][truth.labels[i] >= 0]:
            outline = axes.contour(mask.numpy(force=True), [0.5], colors=TRUE, linestyles="--", linewidths=0.9)
            outline.set(path_effects=HALO)
    return figure
