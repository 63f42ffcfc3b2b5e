"""Cart and pole: push a cart left or right so that the pole on it stays up (Barto, Sutton, Anderson, 1983).

Many carts at a time, in torch. Constants, starts and the limit of 500 steps are those of gymnasium's CartPole-v1.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LIMIT = 500
GRAVITY, CART, POLE, HALF, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, STEEPEST = 2.4, 12 * 2 * math.pi / 360

State = Float[Tensor, "N 4"]  # place, speed, angle, turning: metres and radians, a second each


def started(count: int, generator: torch.Generator | None = None) -> State:
    """Every number drawn evenly from -0.05 to 0.05."""
    return 0.1 * torch.rand(count, 4, generator=generator) - 0.05


def pushed(state: State, right: Int64[Tensor, "N"]) -> tuple[State, Bool[Tensor, "N"]]:
    """The state a fiftieth of a second later (Euler), and whether the cart left the track or the pole fell."""
    _, speed, angle, turning = state.unbind(-1)
    cos, sin, mass = angle.cos(), angle.sin(), CART + POLE
    push = (FORCE * (2 * right - 1) + POLE * HALF * turning.square() * sin) / mass
    turn = (GRAVITY * sin - cos * push) / (HALF * (4 / 3 - POLE * cos.square() / mass))
    gain = push - POLE * HALF * turn * cos / mass
    after = state + SECONDS * torch.stack([speed, gain, turning, turn], -1)
    return after, (after[:, 0].abs() > FARTHEST) | (after[:, 2].abs() > STEEPEST)
