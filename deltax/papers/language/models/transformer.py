"""Attention Is All You Need. Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, 2017.
arXiv:1706.03762

A recurrent encoder-decoder, but self-attention replaces every recurrence, and the decoder cross-attends to the encoder.

    memory = encoder(embed(source) + sinusoids)               source (B, S) -> (B, S, D)
    x = embed(inputs) + sinusoids                             inputs (B, T) -> (B, T, D)
    for each decoder block:
        x = norm(x + self_attention(x))                       causal
        x = norm(x + cross_attention(x, memory))
        x = norm(x + mlp(x))
    logits = x @ embedding.T                                  (B, T, V)

Each branch is added to the hidden states and the sum is normalised (post-norm); GPT-2 later normalises before the
branch. One embedding table serves source, target and logits. The base model has 6 + 6 blocks of width 512 with 8
heads, dropout 0.1, label smoothing 0.1 and 4000 steps of warm-up. The default here has neither dropout nor smoothing
and learns to reverse strings of digits within two minutes on one core.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import SOURCE_TO_LOGITS
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention, Projections, softmax_attention
from deltax.papers.optimization.normalization.layer_norm import LayerNorm, layer_norm
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


class EncoderDecoder(nn.Module):
    """Source (B, S) and inputs (B, T) -> logits (B, T, V) of the token after each input (Figure 1).

    Tokens equal to `PADDING` are masked for all other tokens. `vocab` and `context` come from the task.
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
        """Logits (B, T, V); with a state, inputs continue those of the last call."""
        # segments separate padding from tokens: attention stays within a segment, here and across to the source
        ctx = Context(segments=_segments(inputs), memory=memory, memory_segments=_segments(source), state=state)
        logits = self.head(self.decoder(self.position(self.embedding(inputs), ctx), ctx), self.embedding)
        if state is not None:  # the next call's positions start here
            state.seen += inputs.shape[1]
        return logits

    def forward(self, source: Source, inputs: Tokens) -> Logits:
        return self.decode(inputs, self.encode(source), source)

    def greedy(self, source: Source, start: int, length: int) -> Int[Tensor, "B {length}"]:
        """Greedy decoding of `length` tokens after `start`, never padding. Source (B, S) -> (B, length)."""
        memory, state = self.encode(source), DecodingState()
        said = [source.new_full((len(source), 1), start)]
        for _ in range(length):
            # (B, 1) -> (B, 1): the state caches keys and values of the tokens before
            said.append(_likeliest(self.decode(said[-1], memory, source, state)))
        return torch.cat(said[1:], 1)


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward branch, each in a `residual`. (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, mixer: Part, cross: Part, mlp: Part, residual: Part):
        super().__init__()
        self.mixer_residual, self.mixer = residual(dim), mixer(dim)
        self.cross_residual, self.cross = residual(dim), cross(dim)
        self.mlp_residual, self.mlp = residual(dim), mlp(dim)
        self._mlp_takes_context = takes_context(self.mlp)

    def mixer_branch(self, x: Stream, ctx: Context) -> Stream:
        """Self-attention with its residual."""
        return self.mixer_residual(x, lambda x: self.mixer(x, ctx))

    def cross_branch(self, x: Stream, ctx: Context) -> Stream:
        """Cross-attention to ctx.memory (B, S, D) with its residual."""
        return self.cross_residual(x, lambda x: self.cross(x, ctx))

    def mlp_branch(self, x: Stream, ctx: Context) -> Stream:
        """The feed-forward branch with its residual."""
        return self.mlp_residual(x, (lambda x: self.mlp(x, ctx)) if self._mlp_takes_context else self.mlp)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.mlp_branch(self.cross_branch(self.mixer_branch(x, ctx), ctx), ctx)


def sinusoids(positions: Shaped[Tensor, "*B"], dim: int) -> Float[Tensor, "*B {dim}"]:
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i + 1) the cosine (section 3.5). Positions (...) -> float64 (..., D).

    Positions may be fractions. Raises ValueError for an odd width.
    """
    if dim % 2:
        raise ValueError(f"sinusoids come in pairs of features, and dim {dim} is odd: choose an even dim")
    even = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64)
    angle = positions[..., None] / 10_000 ** (even / dim)
    # sine and cosine interleaved: (..., D/2, 2) -> (..., D)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


class Sinusoidal(nn.Module):
    """x + sinusoids(positions). Stream (B, T, D) -> (B, T, D), for any position."""

    def __init__(self, dim: int, context: int):
        super().__init__()
        sinusoids(torch.zeros(1), dim)  # an odd width fails here, not in the middle of a run

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return x + sinusoids(ctx.where(x), x.shape[-1]).to(x.dtype)


class Scaled(Embedding):
    """An embedding table from N(0, 1/D), its output times sqrt(D) (section 3.4). Tokens (B, T) -> (B, T, D)."""

    def __init__(self, vocab: int, dim: int):
        # the table also gives the logits, where entries of variance 1/D keep them at order one
        super().__init__(vocab, dim, std=dim**-0.5)

    def forward(self, tokens: Tokens) -> Stream:
        return super().forward(tokens) * math.sqrt(self.embedding_dim)


def _likeliest(logits: Logits) -> Tokens:
    return logits[..., PADDING + 1 :].argmax(-1) + PADDING + 1


def _segments(tokens: Tokens) -> Tensor:
    return (tokens == PADDING).long()


@paper(on=(softmax_attention, layer_norm), year=2017, arxiv="1706.03762")
def transformer(*, dim: int = 64, depth: int = 2, heads: int = 4) -> Part:
    # Xavier initialisation, as in torch.nn.Transformer; the paper states none
    project = part(Projections, query=Glorot, key=Glorot, value=Glorot, out=Glorot)
    attention = part(Attention, heads=heads, project=project)
    mlp = part(MLP, up=Glorot, activation=relu, down=Glorot)
    residual = part(PostNorm, norm=LayerNorm)
    block = part(Block, mixer=attention, mlp=mlp, residual=residual)
    decoder_block = part(
        DecoderBlock,
        mixer=part(attention, mask=causal),  # the encoder's has no mask
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
