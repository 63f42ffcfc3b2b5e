"""Neural Discrete Representation Learning. van den Oord, Vinyals, Kavukcuoglu, 2017. arXiv:1711.00937

An autoencoder, but between encoder and decoder each vector becomes the nearest entry of a learned codebook.

A picture becomes a grid of whole numbers, log2 K bits each, and whatever models sequences can model pictures. Nearest
has no slope, so the decoder's gradient is handed to the encoder as if nothing had happened in between, the codebook is
drawn to what is looked up, and the encoder is held to it by a quarter as much (Eq. 3). Instead of a gradient the
codebook can keep running means of what it is looked up for, an online k-means (appendix A.1): `MovingCodebook`. An
entry that is never looked up keeps its place for a while, then the smoothing of the counts, which the released code
(Sonnet) has and the paper has not, draws it to zero, and unless vectors lie there it is dead for good. Later codes put
such an entry where a vector of the batch is (Jukebox, arXiv:2005.00341); `MovingCodebook(revive=...)` does. With a
uniform prior over the codes the KL term of a VAE is a constant, and is gone; the prior that is learned afterwards is
no part of this file. The paper's codebook has 512 entries and its networks are 256 wide; here they read digits.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.errors import UserError
from deltax.parts.model.autoencoder import Autoencoder, Latent, Passed, rebuild
from deltax.parts.numerics.precision import in_float32
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.roles import tag
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.parts.training.steps import Moving
from deltax.shapes import Images, Maps
from deltax.tasks.images.pictures import Drawings

Table = Float[Tensor, "V D"]
Vectors = Float[Tensor, "*B D"]


@in_float32
def nearest(x: Vectors, table: Table) -> Int64[Tensor, "*B"]:
    """The entry of the table at the least distance from each vector (Eq. 1), the first of equals."""
    distance = table.square().sum(1) - 2 * x @ table.mT  # and the square of x, which is the same for all
    return distance.argmin(-1)


def straight_through(x: Tensor, becomes: Tensor) -> Tensor:
    """`becomes`, with the gradient that x would have had."""
    return x + (becomes - x).detach()


class Codebook(nn.Module):
    """The nearest of `codes` learned vectors. Latent (B, width, ...) -> (B, width, ...) and codes (B, ...).

    It charges |sg(z) - e|^2 + commit |z - sg(e)|^2, a mean over the latent (Eq. 3).
    """

    def __init__(self, *, codes: int = 64, width: int = 16, commit: float = 0.25):
        super().__init__()
        self.enters = self.leaves = width
        self.commit = commit
        self.table = tag(nn.Parameter(torch.empty(codes, width)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.table, -1 / len(self.table), 1 / len(self.table))

    def forward(self, latent: Latent) -> Passed:
        codes = nearest(latent.movedim(1, -1).detach(), self.table)
        entry = self.table[codes].movedim(-1, 1)
        cost = (latent.detach() - entry).square() + self.commit * (latent - entry.detach()).square()
        return Passed(straight_through(latent, entry), cost.flatten(1).mean(1), codes)


class MovingCodebook(Moving):
    """A `Codebook` whose entries are running means of the vectors looked up at them (appendix A.1).

    In training each batch adds its counts and sums to what was, times `decay`; an entry is sum over count, the counts
    smoothed so that none is 0. It charges commit |z - sg(e)|^2. An entry whose count falls below `revive`, in vectors a
    batch, becomes a vector of the batch at random, and has that count; at 0 none does.
    """

    def __init__(
        self, *, codes: int = 64, width: int = 16, commit: float = 0.25, decay: float = 0.99, smoothing: float = 1e-5,
        revive: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.enters = self.leaves = width
        self.commit, self.decay, self.smoothing, self.revive = commit, decay, smoothing, revive
        self.register_buffer("table", torch.empty(codes, width))
        self.register_buffer("counts", torch.empty(codes))
        self.register_buffer("sums", torch.empty(codes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)
        nn.init.ones_(self.counts)
        self.sums.copy_(self.table)

    def forward(self, latent: Latent) -> Passed:
        vectors = latent.movedim(1, -1).detach()
        codes = nearest(vectors, self.table)
        entry = self.table[codes].movedim(-1, 1)
        if self.training:
            self.note(vectors.flatten(0, -2), codes.flatten())
        cost = self.commit * (latent - entry).square()
        return Passed(straight_through(latent, entry), cost.flatten(1).mean(1), codes)

    @torch.no_grad()
    @in_float32
    def move(self, vectors: Vectors, codes: Int64[Tensor, "*B"]) -> None:
        mine = nn.functional.one_hot(codes, len(self.table)).to(vectors.dtype)
        self.counts.lerp_(mine.sum(0), 1 - self.decay)
        self.sums.lerp_(mine.mT @ vectors, 1 - self.decay)
        if self.revive > 0:
            dead = (self.counts < self.revive)[:, None]
            drawn = vectors[torch.randint(len(vectors), (len(self.table),), device=vectors.device)]
            self.sums.copy_(torch.where(dead, self.revive * drawn.to(self.sums), self.sums))
            self.counts.clamp_(min=self.revive)
        total = self.counts.sum()
        counts = (self.counts + self.smoothing) / (total + len(self.table) * self.smoothing) * total
        self.table.copy_(self.sums / counts[:, None])


class Beside(nn.Module):
    """x + 1 x 1 convolution(relu(3 x 3 convolution(relu(x)))). Maps (B, D, Y, X), the same."""

    def __init__(self, width: int):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Maps) -> Maps:
        return x + self.narrow(torch.relu(self.wide(torch.relu(x))))


class ConvEncoder(nn.Module):
    """Strided 4 x 4 convolutions, each halving the image, then residual units (section 4.1).

    Images (B, C, Y, X) -> (B, out, Y / 2^halvings, X / 2^halvings).
    """

    can_be_zero = ("depth",)

    def __init__(self, channels: int, out: int, *, width: int = 32, halvings: int = 2, depth: int = 2):
        super().__init__()
        self.halvings = halvings
        self.halves = nn.ModuleList(nn.Conv2d(width if i else channels, width, 4, 2, 1) for i in range(halvings))
        self.units = nn.Sequential(*(Beside(width) for _ in range(depth)))
        self.leave = nn.Conv2d(width, out, 1)

    def forward(self, x: Images) -> Maps:
        if any(size % 2**self.halvings for size in x.shape[2:]):
            raise UserError(f"images of {tuple(x.shape[2:])} do not halve {self.halvings} times: set fewer halvings")
        for half in self.halves:
            x = torch.relu(half(x))
        return self.leave(self.units(x))


class ConvDecoder(nn.Module):
    """Residual units, then transposed 4 x 4 convolutions, each doubling the image. The mirror of `ConvEncoder`."""

    can_be_zero = ("depth",)

    def __init__(self, latent: int, channels: int, *, width: int = 32, halvings: int = 2, depth: int = 2):
        super().__init__()
        self.enter = nn.Conv2d(latent, width, 3, padding=1)
        self.units = nn.Sequential(*(Beside(width) for _ in range(depth)))
        last = halvings - 1
        self.doubles = nn.ModuleList(
            nn.ConvTranspose2d(width, channels if i == last else width, 4, 2, 1) for i in range(halvings)
        )

    def forward(self, x: Maps) -> Maps:
        x = self.units(self.enter(x))
        for double in self.doubles:
            x = double(torch.relu(x))
        return x


@paper(year=2017, arxiv="1711.00937")
def vq_vae(*, codes: int = 64, width: int = 16) -> Part:
    return part(
        Run,
        model=part(
            Autoencoder,
            encoder=part(ConvEncoder),
            bottleneck=part(Codebook, codes=codes, width=width),
            decoder=part(ConvDecoder),
        ),
        task=Drawings,
        objective=part(rebuild),
        batches=from_task,
        optimizer=part(adamw, lr=2e-3, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


def usage(codes: Int64[Tensor, "B ..."], entries: int) -> tuple[float, float]:
    """The share of entries that occur among codes, and the perplexity of how often: 2 to the entropy in bits."""
    often = torch.bincount(codes.flatten(), minlength=entries).double()
    share = often / often.sum()
    return (often > 0).double().mean().item(), torch.exp(-(share * share.clamp(min=1e-300).log()).sum()).item()
