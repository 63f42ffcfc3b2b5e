"""Modules as other people write them, each with a start of its own. (B, T, 6) -> (B, T, 6)."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

DIM = 6


class ZeroGate(nn.Module):
    """A gate that is closed at first."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.branch, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x):
        return x + self.gate(x).sigmoid() * self.branch(x)


class ReZero(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.branch, self.alpha = nn.Linear(dim, dim), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.alpha * self.branch(x)


class Adapter(nn.Module):
    """The way back starts at zero."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.down, self.up = nn.Linear(dim, 2), nn.Linear(2, dim)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.bias.zero_()

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


class BareRandn(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(dim)), nn.Parameter(1 + 0.02 * torch.randn(dim))

    def forward(self, x):
        return x * self.scale + self.shift


class Loaded(nn.Module):
    """Weights from elsewhere."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.linear.load_state_dict({"weight": torch.eye(dim) * 3, "bias": torch.arange(float(dim))})

    def forward(self, x):
        return self.linear(x)


class Tied(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x))


class WeightNorm(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(dim, dim))
        self.spectral = parametrizations.spectral_norm(nn.Linear(dim, dim))

    def forward(self, x):
        return self.spectral(self.linear(x))


class Orthogonal(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)


class RandomBuffer(nn.Module):
    """A fixed projection, drawn once, and one that is no buffer."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.register_buffer("projection", torch.randn(dim, dim) / dim**0.5)
        self.plain = torch.rand(dim)

    def forward(self, x):
        return x @ self.projection * self.plain


class Applied(nn.Module):
    """The root starts every layer, as nanoGPT does."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.layers(x)


class Experts(nn.Module):
    """One tensor, started slice by slice."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dim, dim))
        for expert in self.weight:
            nn.init.xavier_uniform_(expert)

    def forward(self, x):
        return torch.einsum("btd,edf->btf", x, self.weight)


class Copied(nn.Module):
    """A teacher that starts as its student."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.student = nn.Linear(dim, dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)


class Recurrent(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, 8, batch_first=True), 2)

    def forward(self, x):
        return self.encoder(self.lstm(x)[0])


class OwnSeed(nn.Module):
    """Numbers of its own, the same in every run."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        torch.manual_seed(11)
        self.register_buffer("fixed", torch.randn(dim))
        self.register_buffer("own", torch.randn(dim, generator=torch.Generator().manual_seed(12)))
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x) * self.fixed + self.own


class ByNumpy(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(np.random.randn(dim, dim), dtype=torch.float32))

    def forward(self, x):
        return x @ self.weight


class Rejected(nn.Module):
    """Drawn again until it suits."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        with torch.no_grad():
            while self.weight.sum() < 0.5:
                self.weight.normal_()

    def forward(self, x):
        return x * self.weight


STRANGERS = [
    ZeroGate, ReZero, Adapter, BareRandn, Loaded, Tied, WeightNorm, Orthogonal, RandomBuffer, Applied, Experts, Copied,
    Recurrent, OwnSeed, ByNumpy, Rejected,
]  # fmt: skip


class Lazy(nn.Module):
    """Its width is that of its first input."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.linear = nn.LazyLinear(dim)

    def forward(self, x):
        return self.linear(x)


class Meta(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.linear = nn.Linear(dim, dim, device="meta")


class Forgotten(nn.Module):
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
