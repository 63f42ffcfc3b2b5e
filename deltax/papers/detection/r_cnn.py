"""Rich feature hierarchies for accurate object detection and semantic segmentation. Girshick, Donahue, Darrell, Malik,
2013. arXiv:1311.2524

A deep convolutional classifier, but it is run on every region proposal, cropped and warped to one size.

Detection becomes classification: where to look is somebody else's business, and what is there is asked crop by crop.
A regressor on the same features then moves the box; it reads them and does not shape them. The paper takes 2000
proposals from selective search, a pretrained AlexNet, and a linear SVM for each class on its features. Here windows
slide, a small network learns from nothing, and classes are scored by the softmax of the fine-tuning itself, which costs
3.3 points of mAP in appendix B.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.parts.detection.boxes import centred, corners
from deltax.parts.detection.detector import Anchors, RegionDetector, Windows, region_loss
from deltax.parts.detection.regions import Regions, roi_align
from deltax.parts.model.convolution import ConvNet
from deltax.parts.model.linear import Linear
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Images, Maps
from deltax.tasks.detection.coco import CocoScenes


class Pixels(nn.Module):
    """Nothing is computed before the crop: the maps are the images."""

    def __init__(self, channels: int):
        super().__init__()
        self.width, self.strides = channels, (1,)

    def forward(self, images: Images) -> list[Maps]:
        return [images]


class Crops(nn.Module):
    """The network's features of each region, cut out and warped. Maps, images, N regions -> (N, .width)."""

    can_be_zero = ("context",)

    def __init__(self, channels: int, *, backbone: Part, size: int = 16, context: int = 1):
        super().__init__()
        self.backbone = backbone(channels)
        self.size, self.context, self.width = size, context, self.backbone.width

    def forward(
        self, maps: list[Maps], images: Images, regions: Regions, strides: tuple[int, ...] = ()
    ) -> Float[Tensor, "N D"]:
        [pixels] = maps
        return self.backbone(warp(pixels, regions, size=self.size, context=self.context)).mean((-2, -1))


def warp(images: Images, regions: Regions, *, size: int, context: int = 0) -> Float[Tensor, "N _ P P"]:
    """Each region as an image of size x size, whose outer `context` pixels show what lies around it (section 2.1).

    What lies outside the image has the image's mean.
    """
    centre, extent = centred(regions.boxes).chunk(2, -1)
    wider = corners(torch.cat([centre, extent * size / (size - 2 * context)], -1))
    mean = images.mean((-2, -1), keepdim=True)
    return roi_align(images - mean, Regions(wider, regions.image), scale=1.0, out=size, samples=1) + mean[regions.image]


class SeparateHead(nn.Module):
    """Features (N, D) -> class logits (N, V + 1) and, of features held fixed, offsets (N, V, 4) (appendix C)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classes, self.offsets = Linear(width, classes + 1), Linear(width, 4 * classes)

    def forward(self, features: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.offsets(features.detach()).unflatten(-1, (-1, 4))


@paper(year=2013, arxiv="1311.2524")
def r_cnn(*, width: int = 8) -> Part:
    backbone = part(ConvNet, widths=(width, 2 * width, 4 * width))
    return part(
        Run,
        model=part(
            RegionDetector,
            maps=Pixels,
            proposals=part(Windows, anchors=Anchors),
            regions=part(Crops, backbone=backbone),
            region_head=SeparateHead,
        ),
        task=part(CocoScenes, classes=4, held_out=128),
        objective=region_loss,
        batches=from_task,
        optimizer=part(adamw, lr=2e-3, weight_decay=1e-4),
        schedule=cosine,
        loop=part(Loop, batch=8, steps=400),
    )
