"""Networks that look at a noised image and know how noised it is: the frame that every diffusion and flow model shares.

What the output means, noise, image or velocity, is the objective's business.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax.contract import NOISE_TO_IMAGES
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import Linear, OutProj, depth_scaled_init
from deltax.parts.numerics.counts import above
from deltax.parts.training.roles import tag
from deltax.recipe import Part, part
from deltax.shapes import Images, PerExample

Condition = Float[Tensor, "B D"]


class Sinusoids(nn.Module):
    """Sines and cosines of the time, then an MLP. Times (B,) in [0, 1] -> (B, D), D even.

    The wavelengths are those of 1000 diffusion steps, so a whole number of steps counts as time * 1000.
    """

    def __init__(self, dim: int, *, longest: float = 10_000.0):
        super().__init__()
        self.longest = longest
        self.up, self.down = Linear(dim, dim, std=dim**-0.5), Linear(dim, dim, std=dim**-0.5)

    def forward(self, times: PerExample) -> Condition:
        half = self.up.in_features // 2
        turn = torch.exp(-math.log(self.longest) * torch.arange(half, device=times.device) / half)
        angle = 1000 * times[:, None] * turn.to(times.dtype)
        return self.down(nn.functional.silu(self.up(torch.cat([angle.sin(), angle.cos()], -1))))


class Labelled(nn.Module):
    """A learned vector for each class, and one for "any". Labels (B,), or None for any -> (B, D), or (D,)."""

    def __init__(self, classes: int, dim: int, *, std: float = 0.02):
        super().__init__()
        self.std, self.any = std, classes
        self.table = tag(nn.Parameter(torch.empty(classes + 1, dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def forward(self, labels: Int64[Tensor, "B"] | None) -> Tensor:
        return self.table[self.any if labels is None else labels]


class Unlabelled(nn.Module):
    """Does not look at the label."""

    def __init__(self, classes: int, dim: int):
        super().__init__()

    def forward(self, labels: Int64[Tensor, "B"] | None) -> float:
        return 0.0


class PixelBlock(nn.Module):
    """x + down(silu(up(norm(x)) + of the condition)). (B, D) and ctx.condition (B, D) -> (B, D)."""

    def __init__(self, dim: int, *, norm: Part, widen: float = 2):
        super().__init__()
        above(0, widen=widen)
        hidden = int(widen * dim)
        self.norm = norm(dim)
        self.up, self.condition = Linear(dim, hidden, std=dim**-0.5), Linear(dim, hidden, std=dim**-0.5)
        self.down = OutProj(hidden, dim, std=hidden**-0.5)

    def forward(self, x: Float[Tensor, "B D"], ctx: Context) -> Float[Tensor, "B D"]:
        hidden = self.up(self.norm(x)) + self.condition(nn.functional.silu(ctx.condition))
        return x + self.down(nn.functional.silu(hidden))


class Pixels(nn.Module):
    """A residual MLP on all pixels at once, for images of a few dozen. Starts at zero. (B, C, Y, X) -> (B, C, Y, X)."""

    can_be_zero = ("depth",)

    def __init__(self, channels: int, size: int, dim: int, *, depth: int = 3, block: Part, norm: Part):
        super().__init__()
        pixels = channels * size * size
        self.into, self.norm = Linear(pixels, dim, std=pixels**-0.5), norm(dim)
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))
        self.out = Linear(dim, pixels, std=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        depth_scaled_init(self, len(self.blocks))

    def forward(self, x: Images, ctx: Context) -> Images:
        stream = self.into(x.flatten(1))
        for block in self.blocks:
            stream = block(stream, ctx)
        return self.out(self.norm(stream)).view_as(x)


class Denoiser(nn.Module):
    """body(image, conditioned on time + label).

    Images (B, C, Y, X), times (B,) in [0, 1], labels (B,) or None -> images.
    channels, size and classes come from the task.
    """

    interface = NOISE_TO_IMAGES

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        dim: int,
        time: Part = part(Sinusoids),
        label: Part = part(Labelled),
        body: Part,
    ):
        super().__init__()
        self.time, self.label = time(dim), label(classes, dim)
        self.body = body(channels, size, dim)

    def forward(self, x: Images, times: PerExample, labels: Int64[Tensor, "B"] | None = None) -> Images:
        return self.body(x, Context(condition=self.time(times) + self.label(labels)))
