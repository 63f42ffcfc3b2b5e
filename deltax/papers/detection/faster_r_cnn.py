"""Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks. Ren, He, Girshick, Sun, 2015.
arXiv:1506.01497

Fast R-CNN, but the proposals come from a small network on the shared map, which scores and moves anchors.

Once regions share a map, finding them elsewhere is what takes the time. A 3 x 3 convolution looks at every cell and
says of each anchor there whether it is an object and how far off; the best of them, after suppression, are the
proposals. One sigmoid an anchor stands for the paper's softmax of two. All losses are minimised at once, with no
gradient through the corners of a proposal (section 3.2, "approximate joint training"); the box loss is divided by the
sampled anchors, as in released code, which at the paper's sizes is its lambda = 10 over 2400 positions. The paper's
smooth L1 is Fast R-CNN's, square up to an error of one; released code squares only up to 1/9 here (sigma = 3, as
does torchvision), detectron2 nowhere: `RPN(beta=...)`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.detection.fast_r_cnn import fast_r_cnn
from deltax.parts.detection.boxes import (
    IGNORED,
    NOTHING,
    Detections,
    assign,
    centred,
    clip,
    decode,
    encode,
    iou,
    of_found,
    rescue,
    sample,
    suppress,
)
from deltax.parts.detection.detector import Proposals, by_cell, grids
from deltax.parts.numerics.precision import at_least_float32
from deltax.shapes import Images, Maps, PerExample


class RPN(nn.Module):
    """Maps -> the `most` likeliest boxes of each image. `before` of them come to the suppression (section 3.1, 3.3).

    `beta` is the error at which the box loss turns from a square into a straight line.

    A batch of images learns from `count` anchors each, at most half of them an object's: its best anchor's, or of IoU
    0.7 on. Background is below 0.3; what lies between, or crosses the border, is left out.
    """

    def __init__(
        self, width: int, *, anchors: Part, hidden: int = 64, most: int = 50, before: int = 150,
        count: int = 64, beta: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if not beta >= 0:
            raise UserError(f"the box loss is square up to an error of at least 0, not {beta}; set beta to 1.0")
        self.anchors = anchors()
        self.conv = nn.Conv2d(width, hidden, 3, padding=1)
        self.objectness = nn.Conv2d(hidden, self.anchors.count, 1)
        self.offsets = nn.Conv2d(hidden, 4 * self.anchors.count, 1)
        self.most, self.before, self.count, self.beta = most, before, count, beta
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.conv, self.objectness, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Maps], images: Images, strides: tuple[int, ...] = ()) -> Proposals:
        anchors = torch.cat(self.anchors(grids(maps, images, strides), images.device))
        hidden = [torch.relu(self.conv(m)) for m in maps]
        scores = torch.cat([by_cell(self.objectness(h), 1) for h in hidden], 1)[..., 0]
        offsets = torch.cat([by_cell(self.offsets(h), 4) for h in hidden], 1)
        with torch.no_grad():
            boxes, real = self._best(scores, clip(decode(offsets, anchors), *images.shape[-2:]))
        return Proposals(boxes, real, (scores, offsets, anchors, images.shape[-2:]))

    def _best(self, scores: Float[Tensor, "B S"], boxes: Float[Tensor, "B S 4"]) -> tuple[Tensor, Tensor]:
        """The boxes left after suppression, the likeliest first, of at least a pixel each way."""
        take = lambda t, index: t.gather(1, index[..., None].expand(-1, -1, 4))
        odds, index = at_least_float32(scores).sigmoid().topk(min(self.before, scores.shape[1]))
        boxes = take(boxes, index)
        odds = odds.where((boxes[..., 2:] - boxes[..., :2] >= 1).all(-1), 0.0)
        odds, index = suppress(Detections(odds, torch.zeros_like(index), centred(boxes)), 0.7).scores.topk(
            min(self.most, odds.shape[1])
        )
        return take(boxes, index), odds > 0

    def loss(self, proposals: Proposals, boxes: Float[Tensor, "B M 4"], real: Bool[Tensor, "B M"]) -> PerExample:
        scores, offsets, anchors, (rows, columns) = proposals.said
        inside = (anchors == clip(anchors, rows, columns)).all(-1)
        overlaps = iou(anchors[:, None], boxes[:, None]).where(inside[:, None], 0.0)
        found = rescue(assign(overlaps, real, low=0.3, high=0.7), overlaps, real).where(inside, IGNORED)
        mine = found >= 0
        chosen = sample(mine, found == NOTHING, self.count, 0.5)
        scores, offsets = at_least_float32(scores), at_least_float32(offsets)
        goal = encode(of_found(boxes, found, 0.0), anchors).to(offsets.dtype)
        error = nn.functional.smooth_l1_loss(offsets, goal, beta=self.beta, reduction="none").sum(-1)
        miss = nn.functional.binary_cross_entropy_with_logits(scores, mine.to(scores.dtype), reduction="none")
        total = miss.where(chosen, 0.0) + error.where(chosen & mine, 0.0)
        return total.sum(1) / chosen.sum(1).clamp(min=1)


@paper(on=fast_r_cnn, year=2015, arxiv="1506.01497", whole="r-cnn+fast-r-cnn")
def faster_r_cnn(recipe: Part, *, most: int = 50) -> Part:
    return recipe.fill("proposals", RPN, most=most)
