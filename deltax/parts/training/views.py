"""Random changes to images that leave what they show."""

import math

import torch
from torch import nn

from deltax.shapes import Images


def jittered(
    images: Images, *, turn: float = 20.0, move: float = 0.15, zoom: float = 0.15, noise: float = 0.2
) -> Images:
    """Each image turned by up to `turn` degrees, moved by up to `move` of its half-width along each axis, scaled by
    up to 1 +- `zoom`, its border repeated, with Gaussian noise of deviation `noise` on every pixel."""
    n, device = len(images), images.device
    angle, right, down, scale = (2 * torch.rand(4, n, device=device) - 1).unbind()
    angle, scale = angle * math.radians(turn), 1 + zoom * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([cos, -sin, move * right], -1), torch.stack([sin, cos, move * down], -1)], 1)
    places = nn.functional.affine_grid(maps.to(images.dtype), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, places, padding_mode="border", align_corners=False)
    return moved + noise * torch.randn_like(moved)
