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

from deltax import Part, claim, paper, part
from deltax.contract import SOURCE_TO_LOGITS
from deltax.papers.language.softmax_attention import Attention, CrossAttention, Projections, softmax_attention
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.parts.context import Context, DecodingState, takes_context
from deltax.parts.language_model import Embedding, Tied
from deltax.parts.linear import Glorot
from deltax.parts.mlp import MLP, relu
from deltax.parts.objectives import next_token_given_source
from deltax.parts.optimizers import adamw
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.scores import causal
from deltax.parts.stack import Block, PostNorm, Stack
from deltax.shapes import Logits, Memory, Source, Stream, Tokens
from deltax.tasks.sequences import PADDING, Reversal


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


@claim
def a_shift_is_linear():
    """One matrix for each distance k, block-diagonal with a rotation for each pair, takes PE(p) to PE(p + k) for
    every p."""
    dim, positions = 14, torch.arange(50.0, dtype=torch.float64)
    for shift in (1, 7, 1000):
        blocks = []
        for sine, cosine_ in sinusoids(torch.tensor(float(shift), dtype=torch.float64), dim).view(-1, 2):
            blocks.append(torch.stack([torch.stack([cosine_, sine]), torch.stack([-sine, cosine_])]))
        moved = sinusoids(positions, dim) @ torch.block_diag(*blocks).T
        torch.testing.assert_close(moved, sinusoids(positions + shift, dim))


@claim
def the_future_of_the_target_is_not_seen():
    """Changing later inputs changes no earlier logits; changing any real token of the source changes all of them."""
    model, source, inputs = _tiny()
    logits = model(source, inputs)
    later = torch.cat([inputs[:, :4], 3 + (inputs[:, 4:] - 2) % 8], 1)
    torch.testing.assert_close(model(source, later)[:, :4], logits[:, :4])
    assert not torch.allclose(model(source, later)[:, 4:], logits[:, 4:])
    other = source.clone()
    other[:, 0] = 3 + (source[:, 0] - 2) % 8
    assert ((model(other, inputs) - logits).abs().amax(-1) > 1e-9).all()


@claim
def padding_is_not_seen():
    """Logits and gradients for a padded source and target are those for the source and target without their padding."""
    model, source, inputs = _tiny()
    padded = torch.cat([source, source.new_zeros(2, 3)], 1), torch.cat([inputs, inputs.new_zeros(2, 2)], 1)
    gradients = []
    for said in (model(source, inputs), model(*padded)[:, : inputs.shape[1]]):
        model.zero_grad()
        said.square().sum().backward()
        gradients.append([said.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, with_padding in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, with_padding)


@claim
def a_cache_changes_nothing():
    """Read piece by piece, with keys and values kept, the target gets the logits of the full pass, and greedy decoding
    says the likeliest tokens of it."""
    model, source, inputs = _tiny()
    memory, state = model.encode(source), DecodingState()
    steps = [model.decode(piece, memory, source, state) for piece in inputs.split([3, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(source, inputs))
    said = model.greedy(source, 1, 6)
    told = torch.cat([torch.ones_like(said[:, :1]), said[:, :-1]], 1)
    assert torch.equal(_likeliest(model(source, told)), said)


@claim.parity(peer="torch.nn.Transformer with norm_first=False")
def equals_torch():
    """The same random weights give torch's encoder and decoder outputs and gradients, with padding, causal mask and
    all."""
    model, source, inputs = _tiny()
    source[0, -2:], inputs[1, -1:] = PADDING, PADDING
    layer = dict(d_model=12, nhead=3, dim_feedforward=48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2)
    peer = nn.Transformer(12, 3, custom_encoder=encoder, custom_decoder=decoder, batch_first=True).double()
    peer.load_state_dict(to_torch(model.state_dict()))

    embed = lambda tokens: model.position(model.embedding(tokens), Context())
    a = model.decoder(
        embed(inputs),
        Context(segments=_segments(inputs), memory=model.encode(source), memory_segments=_segments(source)),
    )
    b = peer(
        embed(source),
        embed(inputs),
        tgt_mask=torch.ones(7, 7, dtype=torch.bool).triu(1),
        src_key_padding_mask=source == PADDING,
        tgt_key_padding_mask=inputs == PADDING,
        memory_key_padding_mask=source == PADDING,
    )
    real = inputs != PADDING
    torch.testing.assert_close(a[real], b[real])
    weight = torch.randn_like(a[real])
    (a[real] * weight).sum().backward()
    (b[real] * weight).sum().backward()
    gradients = to_torch({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients.keys() == dict(peer.named_parameters()).keys()
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


_TORCH = {
    "mixer.project.out": "self_attn.out_proj",
    "cross.project.out": "multihead_attn.out_proj",
    "mlp.up": "linear1",
    "mlp.down": "linear2",
}


def to_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder and decoder of a state as those of a `torch.nn.Transformer` whose stacks end without a norm.

    torch keeps query, key and value side by side, and numbers its norms in the order of the branches.
    """
    theirs = {}
    for name in [k for k in state if ".blocks." in k]:
        stack, _, index, rest = name.split(".", 3)
        branches = ["mixer", "cross", "mlp"] if stack == "decoder" else ["mixer", "mlp"]
        rest, _, kind = rest.rpartition(".")
        here, there = f"{stack}.blocks.{index}", f"{stack}.layers.{index}"
        if rest.endswith("_residual.norm"):
            number = 1 + branches.index(rest.removesuffix("_residual.norm"))
            theirs[f"{there}.norm{number}.{'weight' if kind == 'gain' else 'bias'}"] = state[name]
        elif rest in _TORCH:
            theirs[f"{there}.{_TORCH[rest]}.{kind}"] = state[name]
        elif rest.endswith(".query"):
            thirds = [
                state[f"{here}.{rest.removesuffix('query')}{third}.{kind}"] for third in ("query", "key", "value")
            ]
            attention = "self_attn" if rest.startswith("mixer") else "multihead_attn"
            theirs[f"{there}.{attention}.in_proj_{kind}"] = torch.cat(thirds)
    return theirs


@claim.measured(paper="28.4 BLEU on WMT14 English to German with the big model (Table 2)")
def learns_to_reverse(lab):
    """After 1200 steps it reverses held-out strings of 12 digits without a mistake in more than 95 % of cases."""
    matches = [lab.train("transformer", seed=seed).evaluation.metrics.get("exact match", 0.0) for seed in lab.seeds(3)]
    return lab.at_least(matches, 0.95, unit="exact match")


def _tiny() -> tuple[EncoderDecoder, Source, Tokens]:
    """A small model in float64 with every parameter random, a source and inputs without padding."""
    torch.manual_seed(0)
    tree = transformer.put("model.dim", 12).set(Attention, heads=3).set(CrossAttention, heads=3)
    model = tree().build({"vocab": 11, "context": 7}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model, torch.randint(3, 11, (2, 5)), torch.randint(3, 11, (2, 7))
