"""The learning rate over a run, as a factor on each group's own rate; `progress` goes from 0 to 1."""

import math


def cosine(progress: float, *, warmup: float = 0.1, floor: float = 0.1) -> float:
    """Up in a line over the first `warmup` of the run, then down to `floor` along half a cosine (arXiv:1608.03983)."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def linear(progress: float, *, warmup: float = 0.1, floor: float = 0.0) -> float:
    """Up in a line over the first `warmup`, then down in a line to `floor`."""
    if progress < warmup:
        return progress / warmup
    return 1 - (1 - floor) * (progress - warmup) / (1 - warmup)


def warmup_stable_decay(progress: float, *, warmup: float = 0.1, decay: float = 0.2, floor: float = 0.0) -> float:
    """Up in a line, level, and down in a line to `floor` over the last `decay` (arXiv:2404.06395)."""
    if progress < warmup:
        return progress / warmup
    if progress < 1 - decay:
        return 1.0
    return 1 - (1 - floor) * (progress - 1 + decay) / decay


def constant(progress: float) -> float:
    """The same rate throughout."""
    return 1.0
