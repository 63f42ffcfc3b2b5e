"""Protocol Models: Scaling Decentralized Training with Communication-Efficient Model Parallelism.
Ramasinghe, Ajanthan, Avraham, Zuo, Long, 2025. arXiv:2506.01260

A transformer in pipeline stages, but block outputs lie in one k-dimensional subspace, so stages exchange k numbers.

Let U (D, k) be orthonormal and the same on all stages. Outputs of attention and MLP, and the learned part of the
embedding, are projected onto its span. A fixed random table F, known to all, keeps tokens apart in all D dimensions.
The stream is then F[t] plus a vector in the span: c = (x - F[t]) U crosses the cut, and x = c U' + F[t] on the other
side is exact. So is the gradient with respect to c. Norms stay inside branches.

The paper projects the weights after each step and shares AdamW's second moment within a column; here the forward pass
projects. The paper also moves U about every 500 steps towards the gradients of the activations (`turn`); recipes here
keep their first U.
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.papers.systems.parallelism.gpipe import gpipe
from deltax.parts.attention.context import Context
from deltax.shapes import Stream, Tokens


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
        """The effective table (V, D), also read by a tied head."""
        return self.inner.weight @ self.basis @ self.basis.mT + self.fixed

    def forward(self, tokens: Tokens) -> Stream:
        # x_0 = E[t] U U' + F[t]
        return self.inner(tokens) @ self.basis @ self.basis.mT + self.fixed[tokens]


class SpanPosition(nn.Module):
    """Adds the inner position embedding, projected onto the span. Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, context: int | tuple[int, ...], *, inner: Part, rank: int):
        super().__init__()
        self.inner = inner(dim, context)
        self.register_buffer("basis", basis(dim, rank))

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + (self.inner(x, ctx) - x) @ self.basis @ self.basis.mT


class InSpan(nn.Module):
    """inner(x) U U': a linear map whose outputs lie in the span. (..., F) -> (..., D)."""

    def __init__(self, dim: int, out: int, *, inner: Part, rank: int):
        super().__init__()
        self.inner = inner(dim, out)
        self.register_buffer("basis", basis(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        # W <- W U U', in the forward pass
        return self.inner(x) @ self.basis @ self.basis.mT


@paper(on=gpipe, arxiv="2506.01260", year=2025)
def subspace_networks(recipe: Part, *, rank: int = 12) -> Part:
    recipe = recipe.wrap("embedding", SpanEmbedding, rank=rank).wrap("position", SpanPosition, rank=rank)
    return recipe.wrap("out", InSpan, rank=rank).wrap("down", InSpan, rank=rank)


def basis(dim: int, rank: int) -> Tensor:
    """U (D, k) with orthonormal columns, the same at each call. Raises UserError for k outside 1 to D."""
    if not 1 <= rank <= dim:
        raise UserError(f"rank must be 1 to {dim}, the width of the stream, not {rank}: choose a smaller rank")
    # a fixed seed: every stage makes the same U
    drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:, :rank].float()


def compress(x: Stream, tokens: Tokens, embedding: SpanEmbedding) -> Tensor:
    """The message over a cut: (x - F[t]) U. (B, T, D) -> (B, T, k)."""
    return (x - embedding.fixed[tokens]) @ embedding.basis


def decompress(crossed: Tensor, tokens: Tokens, embedding: SpanEmbedding) -> Stream:
    """The stream from a message: c U' + F[t]. (B, T, k) -> (B, T, D)."""
    return crossed @ embedding.basis.mT + embedding.fixed[tokens]


def turn(u: Tensor, gradients: Tensor, *, rate: float) -> Tensor:
    """One Riemannian step of |G - G U U'|^2 / |G|^2 on the Grassmann manifold, with QR retraction: U (D, k), G (N,
    D).
    """
    # -gradient of |G - G U U'|^2 / |G|^2, projected onto the tangent space at U
    pull = gradients.mT @ (gradients @ u)
    tangent = 2 * (pull - u @ (u.mT @ pull)) / gradients.square().sum()
    return torch.linalg.qr(u + rate * tangent).Q
