"""Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis. Simard, Steinkraus,
Platt, 2003.

The same training set, but each presentation moves an image by a random small offset.

A digit shifted by one pixel is the same digit, but a network trained at one position only does not generalise to
others. Random shifts enlarge a small training set, so training should be longer. The paper also rotates, skews and
deforms its digits. Karpathy's re-run wraps pixels around; here the border is repeated, so no foreign pixels enter.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltax import Part, paper
from deltax.contract import needs
from deltax.shapes import Images


@needs("images", without=("boxes", "masks"))
def shifted_batches(
    model: nn.Module, task: Any, step: int, *, size: int, seed: int, inner: Callable[..., Any], pixels: int = 1
) -> Any:
    """The training batches of `inner`, shifted. Evaluation does not use this."""
    batch = inner(model, task, step, size=size, seed=seed)
    return batch._replace(images=shifted(batch.images, pixels=pixels))


shifted_batches.can_be_zero = ("pixels",)


@paper(whole="lenet-1989", year=2003, url="https://doi.org/10.1109/ICDAR.2003.1227801")
def shift_augmentation(recipe: Part, *, pixels: int = 1) -> Part:
    return recipe.wrap("batches", shifted_batches, pixels=pixels)


def shifted(images: Images, *, pixels: int = 1) -> Images:
    """Each image moved by uniform random offsets of -pixels to pixels along each axis."""
    # one draw per image and axis
    down, right = torch.randint(-pixels, pixels + 1, (2, len(images)), device=images.device)
    return shift(images, down, right)


def shift(images: Images, down: Int64[Tensor, "B"], right: Int64[Tensor, "B"]) -> Images:
    """Each image moved by whole pixels, with the border repeated. Images (B, C, Y, X), offsets (B,)."""
    b, c, height, width = images.shape
    # output pixel (y, x) reads input (y - down, x - right); clamping repeats the border
    rows = (torch.arange(height, device=images.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right[:, None]).clamp(0, width - 1)  # (B, X)
    moved = images.gather(2, rows[:, None, :, None].expand(b, c, height, width))
    return moved.gather(3, columns[:, None, None, :].expand(b, c, height, width))
