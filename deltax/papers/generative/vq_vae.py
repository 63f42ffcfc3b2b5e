"""Neural Discrete Representation Learning. van den Oord, Vinyals, Kavukcuoglu, 2017. arXiv:1711.00937

An autoencoder, but between encoder and decoder each vector becomes the nearest entry of a learned codebook.

A picture becomes a grid of whole numbers, log2 K bits each, and whatever models sequences can model pictures. Nearest
has no slope, so the decoder's gradient is handed to the encoder as if nothing had happened in between, the codebook is
drawn to what is looked up, and the encoder is held to it by a quarter as much (Eq. 3). Instead of a gradient the
codebook can keep running means of what it is looked up for, an online k-means (appendix A.1): `MovingCodebook`. With
a uniform prior over the codes the KL term of a VAE is a constant, and is gone; the prior that is learned afterwards is
no part of this file. The paper's codebook has 512 entries and its networks are 256 wide; here they read digits.
"""

import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.errors import UserError
from deltax.parts.autoencoder import Autoencoder, Latent, Passed, decibels, rebuild, squared
from deltax.parts.optimizers import adamw
from deltax.parts.roles import tag
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.steps import Moving
from deltax.shapes import Images, Maps
from deltax.tasks.pictures import Drawings

Table = Float[Tensor, "V D"]
Vectors = Float[Tensor, "*B D"]


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
    smoothed so that none is 0. It charges commit |z - sg(e)|^2.
    """

    def __init__(
        self, *, codes: int = 64, width: int = 16, commit: float = 0.25, decay: float = 0.99, smoothing: float = 1e-5
    ):
        super().__init__()
        self.enters = self.leaves = width
        self.commit, self.decay, self.smoothing = commit, decay, smoothing
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
    def move(self, vectors: Vectors, codes: Int64[Tensor, "*B"]) -> None:
        mine = nn.functional.one_hot(codes, len(self.table)).to(vectors.dtype)
        self.counts.lerp_(mine.sum(0), 1 - self.decay)
        self.sums.lerp_(mine.mT @ vectors, 1 - self.decay)
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
        optimizer=part(adamw, rate=2e-3, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


def usage(codes: Int64[Tensor, "B ..."], entries: int) -> tuple[float, float]:
    """The share of entries that occur among codes, and the perplexity of how often: 2 to the entropy in bits."""
    often = torch.bincount(codes.flatten(), minlength=entries).double()
    share = often / often.sum()
    return (often > 0).double().mean().item(), torch.exp(-(share * share.clamp(min=1e-300).log()).sum()).item()


@torch.no_grad()
def told(run) -> tuple[float, Int64[Tensor, "B ..."]]:
    """Decibels of a trained autoencoder on held-out images, and the codes of the training images."""
    held, seen = run.task.all(), run.task.all("train")
    error = squared(run.model(held.images).pixels, held.images).double().mean().item()
    return decibels(error), run.model.encode(seen.images).codes


@claim
def the_encoder_gets_the_decoders_gradient():
    """Whatever the decoder says of the codes it was given reaches the encoder's output unchanged, and nothing of it
    reaches the codebook."""
    torch.manual_seed(0)
    book = Codebook(codes=7, width=5).double()
    latent = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    passed = book(latent).latent
    passed.retain_grad()
    (passed.sin() * torch.randn_like(passed)).sum().backward()
    assert torch.equal(latent.grad, passed.grad)
    assert book.table.grad is None or not book.table.grad.any()


@claim
def each_code_is_the_nearest_and_each_side_has_its_pull():
    """No entry lies nearer to a vector than its own, and the charge's gradient is 2 (e - z) summed over those who
    chose e for the codebook, and a quarter of 2 (z - e) for the encoder, over the size of the latent."""
    torch.manual_seed(0)
    book = Codebook(codes=7, width=5).double()
    nn.init.normal_(book.table)
    latent = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    passed = book(latent)
    vectors, codes = latent.detach().movedim(1, -1).flatten(0, 2), passed.codes.flatten()
    assert torch.equal(torch.cdist(vectors, book.table.detach()).argmin(1), codes)
    torch.testing.assert_close(passed.latent, book.table[passed.codes].movedim(-1, 1))
    passed.cost.sum().backward()
    size = latent[0].numel()
    away = vectors - book.table.detach()[codes]
    torch.testing.assert_close(latent.grad.movedim(1, -1).flatten(0, 2), 0.25 * 2 * away / size)
    pulled = torch.zeros_like(book.table).index_add(0, codes, -2 * away / size)
    torch.testing.assert_close(book.table.grad, pulled)


@claim.parity(peer="scikit-learn KMeans of one iteration")
def without_memory_it_is_a_step_of_k_means():
    """Moving means that forget at once take on a batch the step of Lloyd's algorithm that scikit-learn takes."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    vectors = torch.randn(101, 3, dtype=torch.float64)
    book = MovingCodebook(codes=8, width=3, decay=0.0, smoothing=0.0).double()
    book.table.copy_(vectors[:8])
    peer = KMeans(8, init=vectors[:8].numpy(), n_init=1, max_iter=1, algorithm="lloyd")
    with warnings.catch_warnings(action="ignore"):  # that one iteration has not converged
        centres = peer.fit(vectors.numpy()).cluster_centers_
    book.train()(vectors.mT[None])
    torch.testing.assert_close(book.table, torch.from_numpy(centres))


@claim.parity(peer="vector-quantize-pytorch VectorQuantize")
def equals_vector_quantize():
    """The same codebook gives the same codes, vectors and commitment, and after a training batch the same moving means,
    of both the counts and the entries."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    book = MovingCodebook(codes=9, width=5, decay=0.8)
    peer = VectorQuantize(dim=5, codebook_size=9, decay=0.8, commitment_weight=0.25, eps=1e-5, rotation_trick=False)
    peer._codebook.embed.copy_(book.table[None])
    peer._codebook.embed_avg.copy_(book.sums[None])
    peer._codebook.cluster_size.copy_(book.counts[None])
    latent = torch.randn(2, 5, 12, requires_grad=True)
    ours, (theirs, codes, cost) = book.train()(latent), peer.train()(latent.mT)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.latent, theirs.mT)
    torch.testing.assert_close(ours.cost.mean(), cost.squeeze())
    weight = torch.randn(2, 5, 12)
    ours, theirs = ((x * weight).sum() + y for x, y in ((ours.latent, ours.cost.mean()), (theirs.mT, cost.squeeze())))
    torch.testing.assert_close(*(torch.autograd.grad(y, latent)[0] for y in (ours, theirs)))
    torch.testing.assert_close(book.counts, peer._codebook.cluster_size[0])
    torch.testing.assert_close(book.table, peer._codebook.embed[0])


@claim.measured(paper="CIFAR-10 at 4.67 bits a dimension, a VAE at 4.51 (section 4.1)")
def more_codes_draw_better(lab):
    """On held-out digits of four codes each, 64 entries reconstruct at least 2 dB better than 4."""
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        found = {}
        for entries in (4, 16, 64):
            found[entries], codes = told(lab.train(f"vq-vae(codes={entries})", seed=seed))
            numbers.setdefault(f"{entries} codes: dB", []).append(found[entries])
            numbers.setdefault(f"{entries} codes: perplexity", []).append(usage(codes, entries)[1])
        gains.append(found[64] - found[4])
    return lab.at_least(gains, 2.0, unit="dB", numbers=numbers)
