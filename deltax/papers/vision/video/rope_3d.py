"""Cosmos World Foundation Model Platform for Physical AI, section 5.1: 3-D rotary embedding. NVIDIA, 2025.
arXiv:2501.03575

RoPE, but the features of a head are split into three groups, rotated by frame, row and column.

A video patch has a frame, a row and a column. Each group of feature pairs is rotated by one of them, with its own range
of frequencies, so scores depend on the three distances only. Rows and columns get a third of the pairs each, rounded
down, time the rest. Cosmos' diffusion models measure time in frames at 24 per second, whatever the video's rate, and
extend an axis beyond the trained length by a larger base (`stretch`). Cosmos also adds learned absolute positions per
axis, which are not part of this.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper
from deltax.errors import UserError
from deltax.papers.language.position.rope import rope, rotate
from deltax.shapes import Heads, Positions

Space = tuple[int, int, int]  # frames, rows, columns


class Rotary3D(nn.Module):
    """Rotates each head by frame, row and column. Heads (B, T, H, K), positions (*B, T) -> (B, T, H, K).

    Positions are flat, frame by frame and row by row, in videos of `rows` x `columns` patches. `rate` is a frame's
    duration in frames at 24 per second.
    """

    def __init__(
        self, width: int, *, rows: int, columns: int, base: float = 10_000.0,
        stretch: tuple[float, float, float] = (1.0, 1.0, 1.0), rate: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        groups(width)
        self.space, self.base, self.stretch, self.rate = (0, rows, columns), base, stretch, rate

    def forward(self, x: Heads, positions: Positions) -> Heads:
        # (*B, T, 3)
        places = unravelled(positions, self.space) * torch.tensor([self.rate, 1.0, 1.0], device=positions.device)
        return rotate(x, turns(places, x.shape[-1], base=self.base, stretch=self.stretch).float())


@paper(on=rope, replaces=rope, year=2025, arxiv="2501.03575")
def rope_3d(recipe: Part, *, rows: int = 4, columns: int = 4) -> Part:
    return recipe.fill("qk_position", Rotary3D, rows=rows, columns=columns)


def turns(
    places: Float[Tensor, "*B T 3"], width: int, *, base: float = 10_000.0, stretch: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> Float[Tensor, "*B T _"]:
    """The angle of each pair: time's, then rows', then columns'. (*B, T, 3) -> (*B, T, width / 2).

    Positions may be fractional: frame f of a video at another rate is at f / fps * 24.
    """
    found = []
    for at, size, by in zip(places.unbind(-1), groups(width), stretch, strict=True):
        # pair i of group g rotates by pos_g * base^(-2i / d_g)
        share = torch.arange(0, size, 2, device=places.device, dtype=torch.float64) / size
        found.append(at[..., None] * stretched(base, size, by) ** -share)
    return torch.cat(found, -1)


def groups(width: int) -> Space:
    """The features rotated by time, rows and columns; each even. Raises UserError below a width of 6."""
    side = width // 6 * 2  # d_h = d_w = 2 floor(d / 6), d_t the rest
    if width % 2 or side < 2:
        raise UserError(
            f"a head of {width} features has no three groups of pairs: set dim or heads for an even width of at least 6"
        )
    return width - 2 * side, side, side


def stretched(base: float, width: int, stretch: float) -> float:
    """The base for which the slowest pair rotates `stretch` times more slowly (NTK-aware scaling)."""
    return base * stretch ** (width / (width - 2)) if width > 2 else base


def unravelled(positions: Positions, space: Space) -> Float[Tensor, "*B T 3"]:
    """(frame, row, column) of flat row-major positions."""
    rows, columns = space[1:]
    at = (positions // (rows * columns), positions // columns % rows, positions % columns)
    return torch.stack(at, -1).double()
