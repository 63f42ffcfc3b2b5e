"""Images of any size: anchors cover them on every level, scales are the network's own, and nothing prefers an axis."""

import pytest
import torch

from deltax.errors import UserError
from deltax.expression import recipe
from deltax.papers.detection.fast_r_cnn import roi_pool
from deltax.papers.detection.fpn import Pyramid
from deltax.papers.detection.maskformer import PixelPyramid
from deltax.papers.detection.retinanet import OneStage
from deltax.papers.vision.backbones.resnet import Backbone
from deltax.parts.detection.detector import Anchors, RegionDetector, Windows, grids
from deltax.parts.detection.masks import panoptic, resized, semantic
from deltax.parts.detection.regions import Regions, roi_align, stride_of
from deltax.parts.model.convolution import ConvNet, SmallStem
from deltax.recipe import part

SIZES = [(20, 300), (300, 20), (33, 47), (5, 5), *((n, n) for n in range(17, 23))]
DETECTORS = ["r-cnn", "r-cnn+fast-r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn", "r-cnn+fast-r-cnn+faster-r-cnn+fpn"]
ALL = [*DETECTORS, "retinanet", "detr", "maskformer", "mask2former"]


def built(expression: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return recipe(expression)["model"](channels=1, classes=3).eval()


def anchor_levels(model: torch.nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """The anchors of each level as the model makes them, and the levels' strides; none where it has no anchors."""
    made = []
    anchors = next((m for m in model.modules() if isinstance(m, Anchors)), None)
    if anchors is None:
        model(images)
        return [], ()
    hook = anchors.register_forward_hook(lambda _module, _given, levels: made.append(levels))
    model(images)
    hook.remove()
    [levels] = made
    windows = isinstance(getattr(model, "proposals", None), Windows)
    return levels, (model.proposals.stride,) if windows else model.maps.strides


@pytest.mark.parametrize("expression", ALL)
def test_every_pixel_is_near_an_anchor_of_every_level(expression):
    model, had = built(expression), 0
    with torch.inference_mode():
        for rows, columns in SIZES:
            levels, strides = anchor_levels(model, torch.randn(1, 1, rows, columns))
            for boxes, stride in zip(levels, strides, strict=True):
                for axis, pixels in ((1, rows), (0, columns)):
                    centre = (boxes[:, axis] + boxes[:, axis + 2]).unique() / 2
                    apart = (torch.arange(pixels)[:, None] + 0.5 - centre).abs().amin(1)
                    assert apart.max() <= stride / 2, (rows, columns, stride)
                    assert (centre - stride / 2).max() < pixels, "an anchor's whole cell lies outside of the image"
                had += 1
            if hasattr(model, "detect"):
                assert model.detect(torch.randn(1, 1, rows, columns)).boxes.isfinite().all()
    assert had == (0 if not isinstance(model, OneStage | RegionDetector) else len(SIZES) * len(levels))


@pytest.mark.parametrize("expression", ["resnet", *ALL])
def test_strides_are_those_of_the_maps(expression):
    """The strides that a network states are by how much its maps are smaller, on both axes and at odd sizes too."""
    model, counted = built(expression), 0
    for module in model.modules():
        if isinstance(module, (ConvNet, Backbone)):
            maps = list(module.eval().each(torch.randn(1, module_channels(module), 77, 130)))
        elif isinstance(module, Pyramid):
            maps = module.eval()(torch.randn(1, 1, 77, 130))
        else:
            continue
        counted += 1
        assert [m.shape[-2:] for m in maps] == [(-(-77 // s), -(-130 // s)) for s in module.strides]
        assert [stride_of(torch.zeros(1, 1, 77, 130), m) for m in maps] == list(module.strides)
    assert counted


def module_channels(module: torch.nn.Module) -> int:
    return next(m.in_channels for m in module.modules() if isinstance(m, torch.nn.Conv2d))


def test_a_stem_of_another_stride_moves_all_strides():
    backbone = Backbone(1, stem=part(SmallStem, stride=2), stem_width=4, widths=(4, 8), depths=(1, 1))
    assert backbone.strides == (2, 4) and Backbone(1, stem_width=4, widths=(4, 8), depths=(1, 1)).strides == (4, 8)


def test_a_stride_that_sizes_do_not_give_is_refused():
    with pytest.raises(UserError, match="5 x 1 cells of an image of 5 x 7 pixels fit 0 strides; give the network's"):
        stride_of(torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 5, 1))
    with pytest.raises(UserError, match="1 x 1 cells of an image of 3 x 5 pixels fit 2 strides"):
        stride_of(torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 1, 1))
    assert grids([torch.zeros(1, 1, 1, 1)], torch.zeros(1, 1, 3, 5), (16,)) == [(1, 1, 16)]


def turned(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every filter transposed, and the offsets of x and y in each other's place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(module.weight.mT.contiguous())
        for module in model.modules():
            if isinstance(layer := getattr(module, "offsets", None), torch.nn.Conv2d):
                for values in (layer.weight, layer.bias):
                    values.copy_(values.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1))
    return model


def by_transposed_cell(said: torch.Tensor, levels: list[tuple[int, int]]) -> torch.Tensor:
    """What is said of the anchors of each level, (B, S, V), in the order of the transposed image's anchors."""
    of_cell = said.shape[1] // sum(rows * columns for rows, columns in levels)
    pieces = said.split([rows * columns * of_cell for rows, columns in levels], 1)
    turn = lambda x, grid: x.unflatten(1, (*grid, -1)).transpose(1, 2).flatten(1, 3)
    return torch.cat([turn(x, grid) for x, grid in zip(pieces, levels, strict=True)], 1)


@pytest.mark.parametrize("expression", ["retinanet", "r-cnn+fast-r-cnn+faster-r-cnn+fpn"])
def test_a_transposed_image_has_transposed_answers(expression):
    """With square anchors and transposed filters, a dense head says the same of the transposed image, box for box."""
    torch.manual_seed(0)
    model = recipe(expression).set(Anchors, ratios=(1.0,))["model"](channels=1, classes=3).double().eval()
    images = torch.randn(2, 1, 20, 133, dtype=torch.float64)

    def said(x):
        if isinstance(model, OneStage):
            return tuple(model(x))
        scores, offsets, anchors, _ = model.proposals(model.maps(x), x, model.maps.strides).said
        return scores[..., None], offsets, anchors

    here = said(images)
    there = [m.shape[-2:] for m in model.maps(images)]
    turned(model)
    for i, (ours, theirs) in enumerate(zip(here, said(images.mT.contiguous()), strict=True)):
        if i == 2:
            ours, theirs = ours[None], theirs[None]
        expected = by_transposed_cell(ours, [tuple(grid) for grid in there])
        torch.testing.assert_close(theirs, expected if i == 0 else expected[..., [1, 0, 3, 2]], rtol=1e-9, atol=1e-9)


def test_maps_regions_and_masks_prefer_no_axis():
    torch.manual_seed(0)
    maps, image = torch.randn(2, 3, 5, 37, dtype=torch.float64), torch.tensor([0, 1] * 10)
    low = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([140.0, 18.0])
    boxes = torch.cat([low, low + torch.rand(20, 2, dtype=torch.float64) * 60], -1)
    across = Regions(boxes[:, [1, 0, 3, 2]], image)
    for cut in (roi_pool, roi_align, lambda *a, **k: roi_align(*a, **k, samples=0)):
        ours, theirs = (cut(m, r, scale=0.25, out=3) for m, r in ((maps, Regions(boxes, image)), (maps.mT, across)))
        torch.testing.assert_close(theirs, ours.mT)
    pyramid = PixelPyramid((4, 6, 8), 8).double()
    levels = [torch.randn(2, w, n, m, dtype=torch.float64) for w, n, m in ((4, 11, 43), (6, 6, 22), (8, 3, 11))]
    pixels, [deep] = pyramid(levels)
    turned_pixels, [turned_deep] = turned(pyramid)([m.mT.contiguous() for m in levels])
    torch.testing.assert_close(turned_pixels, pixels.mT)
    torch.testing.assert_close(turned_deep, deep.mT)
    logits, masks = 3 * torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(resized(masks.mT, 40, 13), resized(masks, 13, 40).mT)
    torch.testing.assert_close(semantic(logits, masks.mT), semantic(logits, masks).mT)
    assert torch.equal(panoptic(logits, masks.mT, sure=0.3), panoptic(logits, masks, sure=0.3).transpose(1, 2))
