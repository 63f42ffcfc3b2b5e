"""Claims of post-norm: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import Part, claim, part
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.post_norm import BranchNorm, post_norm
from deltax.papers.language.norm.rms_norm import RMSNorm
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.model.stack import Block, PostNorm, PreNorm


@claim
def the_stream_grows_by_its_gains_at_most():
    """After L branches the root mean square of the hidden states is at most its initial value plus the sum of each
    norm's largest gain, for branches of any size. With pre-norm it exceeds that.
    """
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    size = lambda x: x.square().mean(-1).sqrt()
    for residual, holds in ((BranchNorm, True), (PreNorm, False)):
        stream, bound = x, size(x)
        for _ in range(24):
            join = residual(9, norm=part(RMSNorm)).double()
            nn.init.normal_(join.norm.gain)
            matrix = 100 * torch.randn(9, 9, dtype=torch.float64)
            stream = join(stream, lambda x, matrix=matrix: x @ matrix)
            bound = bound + join.norm.gain.abs().max()
        assert (size(stream) <= bound).all() == holds


@claim
def a_branch_cannot_shout():
    """Multiplying the output of a branch by a positive number changes nothing, with eps = 0."""
    torch.manual_seed(0)
    join = BranchNorm(9, norm=part(RMSNorm, eps=0.0)).double()
    x, branch = torch.randn(2, 5, 9, dtype=torch.float64), nn.Linear(9, 9).double()
    torch.testing.assert_close(join(x, lambda x: 1e4 * branch(x)), join(x, branch))


@claim
def it_keeps_the_norm_and_moves_it():
    """With post-norm, gpt has as many norms as without, of the same class, each after its branch instead of before."""
    tree = gpt + post_norm
    assert tree["model.stack.block.residual"] == part(BranchNorm, norm=part(LayerNorm))
    assert tree.fill("residual", part(PreNorm, norm=LayerNorm)) == gpt


@claim.parity(peer="transformers Olmo2DecoderLayer")
def equals_transformers():
    """With the same branches and random gains, hidden states and gradients of a block equal those of OLMo 2's."""
    from transformers import Olmo2Config
    from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2RotaryEmbedding

    torch.manual_seed(0)
    config = Olmo2Config(
        hidden_size=12, intermediate_size=20, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5
    )
    config._attn_implementation = "eager"
    theirs = Olmo2DecoderLayer(config, 0).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    turns = Olmo2RotaryEmbedding(config)(x, torch.arange(7)[None])

    class Attention(nn.Module):
        def __init__(self, dim: int):
            super().__init__()

        def forward(self, x, ctx):
            return theirs.self_attn(x, position_embeddings=turns, attention_mask=None)[0]

    ours = Block(
        12, mixer=Part(Attention), mlp=Part(lambda dim: theirs.mlp), residual=part(BranchNorm, norm=RMSNorm)
    ).double()
    pairs = (
        (ours.mixer_residual.norm.gain, theirs.post_attention_layernorm.weight),
        (ours.mlp_residual.norm.gain, theirs.post_feedforward_layernorm.weight),
    )
    for gain, weight in pairs:
        gain.data.copy_(weight)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn_like(x)
    mine, peer = ours(a, Context()), theirs(b, position_embeddings=turns, attention_mask=None)
    torch.testing.assert_close(mine, peer, rtol=1e-6, atol=1e-6)  # its RMSNorm computes in float32
    (mine * weight).sum().backward()
    (peer * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    for gain, other in pairs:
        torch.testing.assert_close(gain.grad, other.grad, rtol=1e-5, atol=1e-5)


@claim.measured(paper="more stable training of large models; Swin V2 needs it beyond 658M parameters (Figure 2)")
def is_as_good_as_pre_norm(lab):
    """Both with tuned learning rates, gpt + post-norm needs at most 2 % more compute than gpt (pre-norm) for the same
    loss.
    """
    return lab.compare("gpt", "gpt+post-norm").no_worse


@claim.measured(
    paper="compute-equivalent gain of pre- over post-norm 1.87 at 3.6M parameters (MIT FutureTech ablation)"
)
def the_stream_is_better_left_alone(lab):
    """Both with tuned learning rates, pre-norm gpt reaches the loss of gpt with Vaswani's norm(x + f(x)) with less
    compute. On half a million tokens: on 0.14 million the five pairs left it open, at -0.04 bits per byte [-0.08,
    +0.002].
    """
    norm_last = lab.recipe("gpt").fill("residual", PostNorm)
    return lab.compare(norm_last, "gpt", budget="500k tokens", ladder="off").better
