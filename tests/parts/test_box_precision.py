"""Boxes, regions and masks in 16 bits: the answers of float32; in float64: kept; without any object: no crash."""

import pytest
import torch
from torch import Tensor

from deltax.expression import recipe
from deltax.papers.detection.detr import match, matching_cost, set_loss
from deltax.papers.detection.fast_r_cnn import roi_pool
from deltax.papers.detection.fpn import level_of
from deltax.papers.detection.r_cnn import warp
from deltax.parts.attention.context import Context
from deltax.parts.attention.deformable import DeformableAttention
from deltax.parts.detection import boxes as B
from deltax.parts.detection import masks as M
from deltax.parts.detection.boxes import Detections
from deltax.parts.detection.regions import Regions, roi_align
from deltax.tasks.detection.masks import MaskScenes
from deltax.tasks.detection.scenes import Scenes

HALF = [torch.float16, torch.bfloat16]
F32, F64 = torch.float32, torch.float64


def pixel_boxes(n: int = 40, largest: float = 900.0) -> Tensor:
    """Corners on whole multiples of 8 pixels, which both 16-bit types hold exactly."""
    torch.manual_seed(0)
    low = torch.randint(0, 12, (n, 2)) * 8.0
    return torch.cat([low, low + 8 + torch.randint(0, int(largest / 8), (n, 2)) * 8.0], -1).clamp(max=1008)


A, OTHER, SCORES = pixel_boxes()[:20], pixel_boxes()[20:], torch.linspace(0.1, 1.0, 20).half().bfloat16().float()
LABELS = torch.arange(20) % 3
LOGITS, MASKS = torch.randn(1, 6, 4).bfloat16().float(), (4 * torch.randn(1, 6, 300, 310)).bfloat16().float()
FUNCTIONS = {
    "corners": lambda t: B.corners(t(A)),
    "centred": lambda t: B.centred(t(A)),
    "area": lambda t: B.area(t(A)),
    "iou": lambda t: B.iou(t(A)[:, None], t(OTHER)),
    "giou": lambda t: B.giou(t(A)[:, None], t(OTHER)),
    "clip": lambda t: B.clip(t(A), 515, 333),
    "encode": lambda t: B.encode(t(A), t(OTHER)),
    "decode": lambda t: B.decode(t(SCORES[:, None].expand(-1, 4)), t(OTHER)),
    "nms": lambda t: B.nms(t(A), t(SCORES), 0.4),
    "nms in groups": lambda t: B.nms(t(A), t(SCORES), 0.3, LABELS),
    "suppress": lambda t: B.suppress(Detections(t(SCORES)[None], LABELS[None], t(B.centred(A))[None]), 0.3).scores > 0,
    "assign": lambda t: B.assign(B.iou(t(A)[:, None], t(OTHER)), torch.ones(20, dtype=torch.bool), low=0.3, high=0.5),
    "level_of": lambda t: level_of(t(A), home=2, side=224.0, levels=6),
    "roi_align": lambda t: roi_align(_map(), Regions(t(A), LABELS % 2), scale=1 / 16),
    "roi_align, a sample a cell": lambda t: roi_align(_map(), Regions(t(A), LABELS % 2), scale=1 / 16, samples=0),
    "roi_pool": lambda t: roi_pool(_map(), Regions(t(A), LABELS % 2), scale=1 / 16),
    "warp": lambda t: warp(_map(), Regions(t(A), LABELS % 2), size=5),
    "dice": lambda t: M.dice(t(MASKS).flatten(2), t(MASKS.gt(0).float()).flatten(2)),
    "dice_of_pairs": lambda t: M.dice_of_pairs(t(MASKS)[None].flatten(3), t(MASKS.gt(0).float()).flatten(2)),
    "semantic": lambda t: M.semantic(t(LOGITS), t(MASKS)),
    "instances": lambda t: M.instances(t(LOGITS), t(MASKS)).scores,
    "panoptic": lambda t: M.panoptic(t(LOGITS), t(MASKS), sure=0.3),
}  # fmt: skip


def _map() -> Tensor:
    return torch.arange(2 * 3 * 64 * 64, dtype=F32).view(2, 3, 64, 64).sin()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_16_bit_inputs_have_the_answers_of_float32(name, dtype):
    exact, half = (FUNCTIONS[name](lambda x, d=d: x.to(d)) for d in (F32, dtype))
    if name == "decode":  # its offsets are scores, which only bfloat16 rounds as they are
        exact = FUNCTIONS[name](lambda x: x.to(dtype).float())
    assert half.dtype == exact.dtype and exact.isfinite().all()
    assert torch.equal(half, exact) if dtype == torch.bfloat16 else torch.allclose(half, exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [*HALF, F32, F64])
def test_a_box_overlaps_itself_wholly_and_nothing_not_at_all(dtype):
    side = torch.tensor([1.0, 181, 182, 255, 256, 300, 1000, 4000])
    boxes = torch.stack([side, side, 2 * side, 2 * side], -1).to(dtype)
    assert torch.equal(B.iou(boxes, boxes), torch.ones(8, dtype=B.area(boxes).dtype))
    assert torch.equal(B.giou(boxes, boxes), torch.ones(8, dtype=B.area(boxes).dtype))
    assert B.nms(boxes.repeat(3, 1), torch.rand(24).to(dtype)).sum() < 24
    empty = torch.full((4,), 5.0, dtype=dtype)
    assert B.iou(empty, empty) == 0 and B.giou(empty, empty) == 0


def test_points_are_placed_in_float32_at_least():
    """On a map of 600 columns, a cell in bfloat16 reads where it stands, not two columns away."""
    torch.manual_seed(0)
    attention = DeformableAttention(8, heads=2, levels=1, points=1)
    for parameter in (attention.offsets.bias, attention.value.weight, attention.out.weight):
        torch.nn.init.zeros_(parameter)
    for layer in (attention.value, attention.out):
        torch.nn.init.eye_(layer.weight)
    x = torch.arange(600.0)[None, :, None].expand(1, -1, 8).sin().bfloat16()
    read = attention.bfloat16()(x, Context(grids=((1, 600),)))
    torch.testing.assert_close(read, x, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "expression", ["r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn+fpn", "retinanet", "detr", "maskformer", "mask2former"]
)
@pytest.mark.parametrize("columns", [0, 2])
def test_objectives_keep_float64_and_take_batches_without_objects(expression, columns):
    torch.manual_seed(0)
    tree = recipe(expression)
    model = tree["model"](channels=1, classes=4).double()
    task = (MaskScenes if "mask" in expression else Scenes)(classes=4, most=2)
    batch = task.batch(3, size=4, seed=0)
    floats = {k: v.double() for k, v in batch._asdict().items() if v.is_floating_point()}
    cut = {k: v[:, :columns] for k, v in (batch._asdict() | floats).items() if k in ("boxes", "labels", "masks")}
    batch = batch._replace(**(floats | cut))
    if not columns:
        batch = batch._replace(objects=torch.zeros_like(batch.objects))
    loss = tree["objective"](model, batch)
    assert loss.dtype == F64 and loss.shape == (4,) and loss.isfinite().all()
    loss.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_no_column_is_a_column_of_nothing():
    """Without any object, the loss of DETR is the loss of a batch whose objects are not real."""
    torch.manual_seed(0)
    model, task = recipe("detr")["model"](channels=1, classes=4).double(), Scenes(classes=4, most=2)
    batch = task.batch(0, size=3, seed=0)
    batch = batch._replace(images=batch.images.double(), labels=torch.full_like(batch.labels, -1))
    batch = batch._replace(objects=torch.zeros_like(batch.objects))
    said = model.eval()(batch.images)
    none = batch._replace(labels=batch.labels[:, :0], boxes=batch.boxes[:, :0])
    torch.testing.assert_close(set_loss(said, none), set_loss(said, batch))
    assert matching_cost(said, none).shape[-1] == 0
    assert (match(torch.zeros(2, 3, 0), torch.zeros(2, 0, dtype=torch.bool)) == -1).all()


@pytest.mark.parametrize("samples", [0, 2])
def test_no_region_is_too_large(samples):
    """A region of 1e5 cells, or of 1e12, takes no more memory than one of the map's size."""
    maps = torch.randn(2, 3, 9, 11, dtype=F64)
    boxes = torch.tensor(
        [[0.0, 0, 1e5, 1e5], [-1e5, -1e5, 1e5, 1e5], [-3e4, 2, 7e4, 5], [-1e12, -1e12, 1e12, 1e12], [1, 2, 5, 7]]
    ).double()
    out = roi_align(maps, Regions(boxes, torch.tensor([0, 1, 0, 1, 0])), scale=1.0, out=3, samples=samples)
    assert out.isfinite().all() and out.shape == (5, 3, 3, 3)
    alone = roi_align(maps[:1], Regions(boxes[4:], torch.tensor([0])), scale=1.0, out=3, samples=samples)
    torch.testing.assert_close(out[4:], alone)


def test_a_sample_a_cell_is_a_mean_over_cells():
    """Of a region far larger than the map, each bin is the mean of its samples, those outside counting 0."""
    maps = torch.randn(1, 1, 4, 6, dtype=F64)
    for low, high in ((-40.0, 60.0), (-500.5, 499.7), (0.0, 3.3)):
        box = torch.tensor([[low, low, high, high]], dtype=F64)
        ours = roi_align(maps, Regions(box, torch.tensor([0])), scale=1.0, out=2, samples=0)
        count = max(1, -int(-(high - low) // 2))
        each = roi_align(maps, Regions(box, torch.tensor([0])), scale=1.0, out=2, samples=count)
        torch.testing.assert_close(ours, each)


@pytest.mark.parametrize(
    "expression", ["r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn+fpn", "retinanet", "detr", "mask2former"]
)
@pytest.mark.parametrize("dtype", HALF)
def test_models_of_16_bits_learn_and_answer_in_32(expression, dtype):
    """A model cast to bfloat16, and one under autocast of either type, has float32 losses and finds float32 boxes."""
    torch.manual_seed(0)
    tree = recipe(expression)
    model = tree["model"](channels=1, classes=4)
    batch = (MaskScenes if "mask" in expression else Scenes)(classes=4, most=2).batch(3, size=3, seed=0)
    if dtype == torch.bfloat16:
        model, batch = model.bfloat16(), batch._replace(images=batch.images.bfloat16())
    with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
        loss = tree["objective"](model, batch)
        loss.mean().backward()
        if "mask" not in expression:
            found = model.eval().detect(batch.images)
            assert found.scores.dtype == found.boxes.dtype == F32 and found.boxes.isfinite().all()
    assert loss.dtype == F32 and loss.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
