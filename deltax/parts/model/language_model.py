"""Tokens in, logits out: the frame that every language model here shares."""

import torch
from torch import nn

from deltax.contract import TOKENS_TO_LOGITS
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import init_std
from deltax.parts.training.roles import tag
from deltax.recipe import Part
from deltax.shapes import Logits, Stream, Tokens


class Embedding(nn.Embedding):
    """A table (V, D), drawn from N(0, std), `init_std(dim)` by default. Tokens (B, T) -> stream (B, T, D)."""

    def __init__(self, vocab: int, dim: int, *, std: float | None = None):
        self.std = init_std(dim) if std is None else std
        super().__init__(vocab, dim)
        tag(self.weight, "embedding")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Learned(nn.Module):
    """Adds a learned vector for each position, `faint` as the tokens. Positions from `context` on raise IndexError."""

    def __init__(self, dim: int, context: int, *, std: float | None = None):
        super().__init__()
        self.std = init_std(dim) if std is None else std
        self.table = tag(nn.Parameter(torch.empty(context, dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + self.table[ctx.where(x)]


class Tied(nn.Module):
    """Logits by the transposed token embedding. Stream (B, T, D) -> logits (B, T, V)."""

    def __init__(self, dim: int, vocab: int):
        super().__init__()

    def forward(self, x: Stream, embedding: nn.Module) -> Logits:
        return nn.functional.linear(x, embedding.weight)


class LanguageModel(nn.Module):
    """embedding -> position -> stack -> norm -> head.

    Tokens (B, T) -> logits (B, T, V). `vocab` and `context` come from the task.
    """

    interface = TOKENS_TO_LOGITS

    def __init__(
        self,
        vocab: int,
        context: int,
        *,
        dim: int,
        embedding: Part,
        position: Part,
        stack: Part,
        norm: Part,
        head: Part,
    ):
        super().__init__()
        self.embedding = embedding(vocab, dim)
        self.position = position(dim, context)
        self.stack = stack(dim)
        self.norm = norm(dim)
        self.head = head(dim, vocab)

    def stream(self, tokens: Tokens, ctx: Context) -> Stream:
        """What the blocks leave, before the last norm."""
        return self.stack(self.position(self.embedding(tokens), ctx), ctx)

    def read(self, x: Stream) -> Logits:
        """What the stream says, by the last norm and the head; it can be asked of the stream at any depth."""
        return self.head(self.norm(x), self.embedding)

    def forward(self, tokens: Tokens, ctx: Context | None = None) -> Logits:
        ctx = ctx or Context()
        logits = self.read(self.stream(tokens, ctx))
        if ctx.state is not None:
            ctx.state.seen += tokens.shape[1]
        return logits
