"""Attention Is All You Need. Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, 2017.
arXiv:1706.03762

A recurrent encoder and decoder, but every recurrence is self-attention, and the decoder asks the encoder by
cross-attention.

The encoder reads the whole source at once; the decoder sees its own past, and the source. Order comes in as
sinusoids, added to the embedding once. Each branch is added to the stream and the sum is normalised (post-norm);
GPT-2 was to move the norm before the branch. One table embeds source and target and, transposed, gives the logits.
The base model has 6 + 6 blocks of width 512 with 8 heads, trained with dropout 0.1, label smoothing 0.1 and 4000
steps of warm-up; the default here has neither dropout nor smoothing, and learns to reverse strings of digits within
two minutes on one core.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import SOURCE_TO_LOGITS
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention, Projections, softmax_attention
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context, DecodingState, takes_context
from deltax.parts.attention.scores import causal
from deltax.parts.model.language_model import Embedding, Tied
from deltax.parts.model.linear import Glorot
from deltax.parts.model.mlp import MLP, relu
from deltax.parts.model.stack import Block, PostNorm, Stack
from deltax.parts.training.objectives import next_token_given_source
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Logits, Memory, Source, Stream, Tokens
from deltax.tasks.language.sequences import PADDING, Reversal


def sinusoids(positions: Shaped[Tensor, "*B"], dim: int) -> Float[Tensor, "*B {dim}"]:
    """sin(p / 10000^(2i/D)) at feature 2i and the cosine at 2i + 1 (section 3.5). Positions (...) -> float64 (..., D).

    Positions need not be whole. Raises ValueError for an odd width.
    """
    if dim % 2:
        raise ValueError(f"sinusoids come in pairs; a width of {dim} is odd")
    even = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64)
    angle = positions[..., None] / 10_000 ** (even / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


class Sinusoidal(nn.Module):
    """Adds the sinusoids of each position. Stream (B, T, D) -> (B, T, D); no position is too far."""

    def __init__(self, dim: int, context: int):
        super().__init__()
        sinusoids(torch.zeros(1), dim)  # an odd width fails here, not in the middle of a run

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + sinusoids(ctx.where(x), x.shape[-1]).to(x.dtype)


class Scaled(Embedding):
    """A table drawn from N(0, 1/D), read times sqrt(D) (section 3.4). Tokens (B, T) -> stream (B, T, D)."""

    def __init__(self, vocab: int, dim: int):
        super().__init__(vocab, dim, std=dim**-0.5)

    def forward(self, tokens: Tokens) -> Stream:
        return super().forward(tokens) * math.sqrt(self.embedding_dim)


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward branch, each joined to the stream by a `residual`."""

    def __init__(self, dim: int, *, mixer: Part, cross: Part, mlp: Part, residual: Part):
        super().__init__()
        self.mixer_residual, self.mixer = residual(dim), mixer(dim)
        self.cross_residual, self.cross = residual(dim), cross(dim)
        self.mlp_residual, self.mlp = residual(dim), mlp(dim)
        self._mlp_takes_context = takes_context(self.mlp)

    def mixer_branch(self, x: Stream, ctx: Context) -> Stream:
        """The branch that mixes the stream itself, joined to it."""
        return self.mixer_residual(x, lambda x: self.mixer(x, ctx))

    def cross_branch(self, x: Stream, ctx: Context) -> Stream:
        """The branch that asks the memory, joined to the stream."""
        return self.cross_residual(x, lambda x: self.cross(x, ctx))

    def mlp_branch(self, x: Stream, ctx: Context) -> Stream:
        """The branch of every position by itself, joined to the stream."""
        return self.mlp_residual(x, (lambda x: self.mlp(x, ctx)) if self._mlp_takes_context else self.mlp)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.mlp_branch(self.cross_branch(self.mixer_branch(x, ctx), ctx), ctx)


class EncoderDecoder(nn.Module):
    """Source (B, S) and inputs (B, T) -> logits (B, T, V) of what follows each input (Figure 1).

    Tokens equal to `PADDING` are padding: no real token sees them. `vocab` and `context` come from the task.
    """

    interface = SOURCE_TO_LOGITS

    def __init__(
        self,
        vocab: int,
        context: int,
        *,
        dim: int,
        embedding: Part,
        position: Part,
        encoder: Part,
        decoder: Part,
        head: Part,
    ):
        super().__init__()
        self.embedding = embedding(vocab, dim)
        self.position = position(dim, context)
        self.encoder = encoder(dim)
        self.decoder = decoder(dim)
        self.head = head(dim, vocab)

    def encode(self, source: Source) -> Memory:
        ctx = Context(segments=_segments(source))
        return self.encoder(self.position(self.embedding(source), ctx), ctx)

    def decode(self, inputs: Tokens, memory: Memory, source: Source, state: DecodingState | None = None) -> Logits:
        """Logits after each input; under a state, inputs go on where the last call ended."""
        ctx = Context(segments=_segments(inputs), memory=memory, memory_segments=_segments(source), state=state)
        logits = self.head(self.decoder(self.position(self.embedding(inputs), ctx), ctx), self.embedding)
        if state is not None:
            state.seen += inputs.shape[1]
        return logits

    def forward(self, source: Source, inputs: Tokens) -> Logits:
        return self.decode(inputs, self.encode(source), source)

    def greedy(self, source: Source, start: int, length: int) -> Int[Tensor, "B {length}"]:
        """The likeliest next token but padding, `length` times, from `start` on. Source (B, S) -> (B, length)."""
        memory, state = self.encode(source), DecodingState()
        said = [source.new_full((len(source), 1), start)]
        for _ in range(length):
            said.append(_likeliest(self.decode(said[-1], memory, source, state)))
        return torch.cat(said[1:], 1)


def _likeliest(logits: Logits) -> Tokens:
    return logits[..., PADDING + 1 :].argmax(-1) + PADDING + 1


def _segments(tokens: Tokens) -> Tensor:
    return (tokens == PADDING).long()


@paper(on=softmax_attention, year=2017, arxiv="1706.03762")
def transformer(*, dim: int = 64, depth: int = 2, heads: int = 4) -> Part:
    project = part(Projections, query=Glorot, key=Glorot, value=Glorot, out=Glorot)
    attention = part(Attention, heads=heads, project=project)
    mlp = part(MLP, up=Glorot, activation=relu, down=Glorot)
    residual = part(PostNorm, norm=LayerNorm)
    block = part(Block, mixer=attention, mlp=mlp, residual=residual)
    decoder_block = part(
        DecoderBlock,
        mixer=part(attention, mask=causal),
        cross=part(CrossAttention, heads=heads, project=project),
        mlp=mlp,
        residual=residual,
    )
    model = part(
        EncoderDecoder,
        dim=dim,
        embedding=Scaled,
        position=Sinusoidal,
        encoder=part(Stack, depth=depth, block=block),
        decoder=part(Stack, depth=depth, block=decoder_block),
        head=Tied,
    )
    return part(
        Run,
        model=model,
        task=Reversal,
        objective=next_token_given_source,
        batches=from_task,
        optimizer=part(adamw, rate=2e-3, beta2=0.98, decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=32, steps=1200),
    )
