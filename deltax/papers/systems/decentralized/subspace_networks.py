"""Protocol Models: Scaling Decentralized Training with Communication-Efficient Model Parallelism.
Ramasinghe, Ajanthan, Avraham, Zuo, Long, 2025. arXiv:2506.01260

A transformer over a pipeline, but all that its blocks write lies in one subspace of k dimensions, so that k numbers a
position cross from stage to stage and nothing is lost.

Let U (D, k) be orthonormal and the same everywhere. What attention and MLP write to the stream is projected onto its
span, and so is the learned part of the embedding; a fixed table of random vectors F, known to all, keeps tokens apart
in all D dimensions. Then the stream is F[t] and a vector in the span: c = (x - F[t]) U crosses the cut, out of which
comes x = c U' + F[t], and the gradient with respect to c is all that needs to come back. Norms stay inside branches.

The paper projects the weights after each step and shares AdamW's second moment within a column; here the projection is
part of the forward pass, so the weights in effect are always in the span. It also turns U, every 500 steps or so, to
where the gradients of the activations lie (`turn`); recipes here keep the U that they start with.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.parallelism.gpipe import gpipe
from deltax.parts.attention.context import Context
from deltax.shapes import Stream, Tokens


def basis(dim: int, rank: int) -> Tensor:
    """U (D, k) with orthonormal columns, the same wherever it is asked for. Raises UserError for k outside 1 to D."""
    if not 1 <= rank <= dim:
        raise UserError(f"a subspace of a stream of width {dim} has 1 to {dim} dimensions, not {rank}")
    drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:, :rank].float()


class InSpan(nn.Module):
    """inner(x) U U': a map that writes to the span alone. (..., F) -> (..., D)."""

    def __init__(self, dim: int, out: int, *, inner: Part, rank: int):
        super().__init__()
        self.inner = inner(dim, out)
        self.register_buffer("basis", basis(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.basis @ self.basis.mT


class SpanEmbedding(nn.Module):
    """E[t] U U' + F[t], with E learned and F fixed, drawn from N(0, std). Tokens (B, T) -> stream (B, T, D)."""

    def __init__(self, vocab: int, dim: int, *, inner: Part, rank: int, std: float = 0.02):
        super().__init__()
        self.inner, self.std = inner(vocab, dim), std
        self.register_buffer("basis", basis(dim, rank))
        self.register_buffer("fixed", torch.empty(vocab, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fixed, std=self.std)

    @property
    def weight(self) -> Tensor:
        """The table in effect (V, D), which a tied head reads too."""
        return self.inner.weight @ self.basis @ self.basis.mT + self.fixed

    def forward(self, tokens: Tokens) -> Stream:
        return self.inner(tokens) @ self.basis @ self.basis.mT + self.fixed[tokens]


class SpanPosition(nn.Module):
    """Adds what the inner position adds, projected onto the span. Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, context: int | tuple[int, ...], *, inner: Part, rank: int):
        super().__init__()
        self.inner = inner(dim, context)
        self.register_buffer("basis", basis(dim, rank))

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + (self.inner(x, ctx) - x) @ self.basis @ self.basis.mT


def compress(x: Stream, tokens: Tokens, embedding: SpanEmbedding) -> Tensor:
    """What crosses a cut: (x - F[t]) U. (B, T, D) -> (B, T, k)."""
    return (x - embedding.fixed[tokens]) @ embedding.basis


def decompress(crossed: Tensor, tokens: Tokens, embedding: SpanEmbedding) -> Stream:
    """The stream back: c U' + F[t]. (B, T, k) -> (B, T, D)."""
    return crossed @ embedding.basis.mT + embedding.fixed[tokens]


def turn(u: Tensor, gradients: Tensor, *, rate: float) -> Tensor:
    """U (D, k) moved to lose less of the gradients (N, D): one Riemannian descent step of |G - G U U'|^2 / |G|^2 on the
    Grassmann manifold, retracted by QR.
    """
    pull = gradients.mT @ (gradients @ u)
    tangent = 2 * (pull - u @ (u.mT @ pull)) / gradients.square().sum()
    return torch.linalg.qr(u + rate * tangent).Q


@paper(on=(gpipe, gpt), arxiv="2506.01260", year=2025)
def subspace_networks(recipe: Part, *, rank: int = 12) -> Part:
    recipe = recipe.wrap("embedding", SpanEmbedding, rank=rank).wrap("position", SpanPosition, rank=rank)
    return recipe.wrap("out", InSpan, rank=rank).wrap("down", InSpan, rank=rank)
