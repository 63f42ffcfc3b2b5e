"""Claims of transformer: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention
from deltax.papers.language.models.transformer import EncoderDecoder, _likeliest, _segments, sinusoids, transformer
from deltax.parts.attention.context import Context, DecodingState
from deltax.shapes import Source, Tokens
from deltax.tasks.language.sequences import PADDING
from deltax.weights.language.models.transformer import to_torch


@claim
def a_shift_is_linear():
    """For each distance k, one block-diagonal rotation matrix maps PE(p) to PE(p + k), for every p."""
    dim, positions = 14, torch.arange(50.0, dtype=torch.float64)
    for shift in (1, 7, 1000):
        blocks = []
        for sine, cosine_ in sinusoids(torch.tensor(float(shift), dtype=torch.float64), dim).view(-1, 2):
            blocks.append(torch.stack([torch.stack([cosine_, sine]), torch.stack([-sine, cosine_])]))
        moved = sinusoids(positions, dim) @ torch.block_diag(*blocks).T
        torch.testing.assert_close(moved, sinusoids(positions + shift, dim))


@claim
def the_future_of_the_target_is_not_seen():
    """Changing later inputs leaves earlier logits unchanged; changing any source token that is not padding changes
    all of them.
    """
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
    """Logits and gradients with a padded source and target equal those without the padding."""
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
    """Decoding in pieces with a key/value cache gives the logits of one full pass, and greedy decoding gives the
    argmax tokens of that pass.
    """
    model, source, inputs = _tiny()
    memory, state = model.encode(source), DecodingState()
    steps = [model.decode(piece, memory, source, state) for piece in inputs.split([3, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(source, inputs))
    said = model.greedy(source, 1, 6)
    told = torch.cat([torch.ones_like(said[:, :1]), said[:, :-1]], 1)
    assert torch.equal(_likeliest(model(source, told)), said)


@claim.parity(peer="torch.nn.Transformer with norm_first=False")
def equals_torch():
    """With the same random weights, outputs and gradients equal those of torch's encoder and decoder, with padding
    and causal mask.
    """
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


@claim.measured(paper="28.4 BLEU on WMT14 English to German with the big model (Table 2)")
def learns_to_reverse(lab):
    """After 1200 steps more than 95 % of held-out strings of 12 digits are reversed without a mistake."""
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
