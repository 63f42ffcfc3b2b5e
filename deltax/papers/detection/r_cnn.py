"""Rich feature hierarchies for accurate object detection and semantic segmentation. Girshick, Donahue, Darrell, Malik,
2013. arXiv:1311.2524

A deep convolutional classifier, but it is run on every region proposal, cropped and warped to one size.

Detection becomes classification: where to look is somebody else's business, and what is there is asked crop by crop.
A regressor on the same features then moves the box; it reads them and does not shape them. The paper takes 2000
proposals from selective search, a pretrained AlexNet, and a linear SVM for each class on its features. Here windows
slide, a small ResNet learns from nothing, and classes are scored by the softmax of the fine-tuning itself, which costs
3.3 points of mAP in appendix B.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.papers.vision.resnet import Backbone, resnet
from deltax.parts.boxes import centred, corners, decode, encode, iou, nms
from deltax.parts.convolution import SmallStem
from deltax.parts.detector import RegionDetector, Windows, region_loss
from deltax.parts.linear import Linear
from deltax.parts.optimizers import adamw
from deltax.parts.regions import Regions, roi_align
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.shapes import Images
from deltax.tasks.scenes import Scenes, draw


class Pixels(nn.Module):
    """Nothing is computed before the crop: the maps are the images."""

    def __init__(self, channels: int):
        super().__init__()
        self.width = channels

    def forward(self, images: Images) -> list[Images]:
        return [images]


class Crops(nn.Module):
    """The network's features of each region, cut out with `context` pixels around it and warped to `size` (section 2.1).

    What lies outside the image has the image's mean. Maps, images, N regions -> (N, .width).
    """

    def __init__(self, channels: int, *, backbone: Part = part(Backbone), size: int = 16, context: int = 1):
        super().__init__()
        self.backbone = backbone(channels)
        self.size, self.context, self.width = size, context, self.backbone.width

    def forward(self, maps: list[Images], images: Images, regions: Regions) -> Float[Tensor, "N D"]:
        [pixels] = maps
        centre, size = centred(regions.boxes).chunk(2, -1)
        wider = corners(torch.cat([centre, size * self.size / (self.size - 2 * self.context)], -1))
        mean = pixels.mean((-2, -1), keepdim=True)
        crops = roi_align(pixels - mean, Regions(wider, regions.image), scale=1.0, out=self.size, samples=1)
        return self.backbone(crops + mean[regions.image]).mean((-2, -1))


class SeparateHead(nn.Module):
    """Features (N, D) -> class logits (N, V + 1) and, of features held fixed, offsets (N, V, 4) (appendix C)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classes, self.offsets = Linear(width, classes + 1), Linear(width, 4 * classes)

    def forward(self, features: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.offsets(features.detach()).unflatten(-1, (-1, 4))


@paper(on=resnet, year=2013, arxiv="1311.2524")
def r_cnn(*, width: int = 16) -> Part:
    backbone = part(
        resnet["model.backbone"], stem=SmallStem, stem_width=width, widths=(width, 2 * width, 4 * width), depths=(1, 1, 1)
    )
    return part(
        Run,
        model=part(
            RegionDetector,
            maps=Pixels,
            proposals=Windows,
            regions=part(Crops, backbone=backbone),
            region_head=SeparateHead,
        ),
        task=part(Scenes, classes=4),
        objective=region_loss,
        batches=from_task,
        optimizer=part(adamw, rate=2e-3, decay=1e-4),
        schedule=cosine,
        loop=part(Loop, batch=8, steps=400),
    )
