"""Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis. Simard, Steinkraus,
Platt, 2003.

The same training set, but an image is moved a little each time it is shown.

A digit one pixel to the left is the same digit, and a network that is only ever shown it in one place has no way to
know. Moving each image at random tells it, for nothing, and makes of a small set a large one; so train longer.
The paper also turns, skews and bends its digits. Karpathy's re-run rolls what leaves on one side in on the other; here
the border is repeated outwards, so nothing comes in that was not there.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax import Part, paper
from deltax.contract import needs
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.shapes import Images


def shift(images: Images, down: Int64[Tensor, "B"], right: Int64[Tensor, "B"]) -> Images:
    """Each image moved by whole pixels, its border repeated. Images (B, C, Y, X), offsets (B,)."""
    b, c, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right[:, None]).clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand(b, c, height, width))
    return moved.gather(3, columns[:, None, None, :].expand(b, c, height, width))


def shifted(images: Images, *, pixels: int = 1) -> Images:
    """Each image moved at random, by -pixels to pixels along each axis, all moves equally likely."""
    down, right = torch.randint(-pixels, pixels + 1, (2, len(images)), device=images.device)
    return shift(images, down, right)


@needs("images", without=("boxes", "masks"))
def shifted_batches(
    model: nn.Module, task: Any, step: int, *, size: int, seed: int, inner: Callable[..., Any], pixels: int = 1
) -> Any:
    """The batches of `inner`, shifted. What is evaluated on never passes here."""
    batch = inner(model, task, step, size=size, seed=seed)
    return batch._replace(images=shifted(batch.images, pixels=pixels))


shifted_batches.can_be_zero = ("pixels",)


@paper(on=lenet_1989, year=2003, url="https://doi.org/10.1109/ICDAR.2003.1227801")
def shift_augmentation(recipe: Part, *, pixels: int = 1) -> Part:
    return recipe.wrap("batches", shifted_batches, pixels=pixels)
