"""Cosmos World Foundation Model Platform for Physical AI, section 5.1: 3-D rotary embedding. NVIDIA, 2025.
arXiv:2501.03575

RoPE, but the features of a head are split in three groups, turned by time, by row and by column.

A patch of a video stands at a frame, a row and a column. Each group of feature pairs turns by one of the three, with
frequencies of its own from fast to slow, so a score knows the three distances and nothing else. Rows and columns get a
third of the pairs each, rounded down, and time the rest. The diffusion models measure time in frames of 24 a second,
whatever the rate of the video, and stretch an axis beyond what was trained on by a larger base (`stretch`). Learned
absolute positions for each axis go with them, and are no part of this.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper
from deltax.errors import UserError
from deltax.papers.language.position.rope import rope, rotate
from deltax.shapes import Heads, Positions

Space = tuple[int, int, int]  # frames, rows, columns


def groups(width: int) -> Space:
    """Features that turn with time, with rows and with columns; each even. Raises UserError below a width of 6."""
    side = width // 6 * 2
    if width % 2 or side < 2:
        raise UserError(f"heads of {width} features do not make three groups of pairs: make it even and at least 6")
    return width - 2 * side, side, side


def stretched(base: float, width: int, stretch: float) -> float:
    """The base whose slowest pair turns `stretch` times more slowly (NTK-aware scaling)."""
    return base * stretch ** (width / (width - 2)) if width > 2 else base


def turns(
    places: Float[Tensor, "*B T 3"], width: int, *, base: float = 10_000.0, stretch: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> Float[Tensor, "*B T _"]:
    """Angles of each pair at (frame, row, column): time's, then rows', then columns'. (*B, T, 3) -> (*B, T, width / 2).

    Places need not be whole: a frame at another rate stands at frame / fps * 24.
    """
    found = []
    for at, size, by in zip(places.unbind(-1), groups(width), stretch, strict=True):
        share = torch.arange(0, size, 2, device=places.device, dtype=torch.float64) / size
        found.append(at[..., None] * stretched(base, size, by) ** -share)
    return torch.cat(found, -1)


def unravelled(positions: Positions, space: Space) -> Float[Tensor, "*B T 3"]:
    """Frame, row and column of positions that count frame by frame and row by row."""
    rows, columns = space[1:]
    at = (positions // (rows * columns), positions // columns % rows, positions % columns)
    return torch.stack(at, -1).double()


class Rotary3D(nn.Module):
    """Turns each head by its frame, row and column. Heads (B, T, H, K) and positions (*B, T) -> (B, T, H, K).

    Positions count frame by frame, row by row, in videos of `rows` x `columns` patches. `rate` is how many of Cosmos's
    frames, 24 a second, one frame lasts.
    """

    def __init__(
        self,
        width: int,
        *,
        rows: int,
        columns: int,
        base: float = 10_000.0,
        stretch: tuple[float, float, float] = (1.0, 1.0, 1.0),
        rate: float = 1.0,
    ):
        super().__init__()
        groups(width)
        self.space, self.base, self.stretch, self.rate = (0, rows, columns), base, stretch, rate

    def forward(self, x: Heads, positions: Positions) -> Heads:
        places = unravelled(positions, self.space) * torch.tensor([self.rate, 1.0, 1.0], device=positions.device)
        return rotate(x, turns(places, x.shape[-1], base=self.base, stretch=self.stretch).float())


@paper(on=rope, replaces=rope, year=2025, arxiv="2501.03575")
def rope_3d(recipe: Part, *, rows: int = 4, columns: int = 4) -> Part:
    return recipe.fill("qk_position", Rotary3D, rows=rows, columns=columns)
